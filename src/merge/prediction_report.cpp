#include "merge/prediction_report.h"

#include <fmt/format.h>

#include <set>

#include "base/text.h"

namespace kiln {
namespace {

template <typename T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

/// The share of the gap from the last snapshot to the real anneal that a predictor tells.
std::optional<double> recovered(const Prediction& prediction, const Predictor& predictor) {
  if (!prediction.annealed_loss || !predictor.loss) return std::nullopt;
  const double gap = prediction.last_loss - *prediction.annealed_loss;
  return gap == 0 ? std::nullopt : std::optional((prediction.last_loss - *predictor.loss) / gap);
}

Json to_json(const Anneal& anneal) {
  return {{"begin", anneal.begin},
          {"end", anneal.end},
          {"shape", to_string(anneal.shape)},
          {"final_ratio", anneal.final_ratio}};
}

std::string heading(const std::string& run, const Prediction& p) {
  return fmt::format(
      "{}: anneal of {} steps, {} to {} of the peak rate, from step {} to {}{}\n{} held-out tokens in {} sequence{}, "
      "in {}\n\n",
      run, p.anneal.steps(), to_string(p.anneal.shape), p.anneal.final_ratio, p.anneal.begin, p.anneal.end,
      p.tokens ? fmt::format(" ({} tokens)", human_count(static_cast<double>(*p.tokens))) : "", p.targets, p.sequences,
      p.sequences == 1 ? "" : "s", p.evaluated_in);
}

std::string error_text(const std::optional<double>& standard_error) {
  return standard_error ? fmt::format("{:.4f}", *standard_error) : "-";
}

std::string predictor_rows(const Prediction& p) {
  const bool checked = p.annealed_loss.has_value();
  std::string text = fmt::format("{:<20} {:>9} {:>9} {:>8}", "predictor", "loss", "- last", "s.e.");
  if (checked) text += fmt::format(" {:>9} {:>8} {:>9}", "error", "s.e.", "of gap");
  text += "  note\n";
  for (const Predictor& row : p.predictors) {
    text += fmt::format("{:<20} ", row.name);
    text += row.loss ? fmt::format("{:>9.4f} {:>+9.4f} {:>8}", *row.loss, *row.loss - p.last_loss,
                                   error_text(row.standard_error))
                     : fmt::format("{:>9} {:>9} {:>8}", "-", "-", "-");
    const std::optional<double> share = recovered(p, row);
    if (checked && row.error)
      text += fmt::format(" {:>+9.4f} {:>8} {:>9}", *row.error, error_text(row.error_standard_error),
                          share ? fmt::format("{:.0f} %", 100 * *share) : "-");
    else if (checked)
      text += fmt::format(" {:>9} {:>8} {:>9}", "-", "-", "-");
    text += "  " + row.note + "\n";
  }
  return text;
}

/// Rows of V, columns of N.
std::string sweep_rows(const Prediction& p) {
  if (p.sweep.empty()) return "";
  std::set<std::size_t> counts;
  std::set<std::int64_t> strides;
  for (const SweepCell& cell : p.sweep) counts.insert(cell.count), strides.insert(cell.every_steps);
  std::string text = "\nmean of N snapshots, V steps apart, minus the last:\n";
  text += fmt::format("{:>8}", "V \\ N");
  for (const std::size_t count : counts) text += fmt::format(" {:>9}", count);
  for (const std::int64_t stride : strides) {
    text += fmt::format("\n{:>8}", stride);
    for (const std::size_t count : counts) {
      std::string shown = "-";
      for (const SweepCell& cell : p.sweep)
        if (cell.count == count && cell.every_steps == stride) shown = fmt::format("{:+.4f}", cell.against_last.mean);
      text += fmt::format(" {:>9}", shown);
    }
  }
  return text + "\n";
}

}  // namespace

Json to_json(const Prediction& p) {
  Json json = {{"anneal", to_json(p.anneal)},
               {"tokens", or_null(p.tokens)},
               {"sequences", p.sequences},
               {"targets", p.targets},
               {"evaluated_in", p.evaluated_in},
               {"models_evaluated", p.models_evaluated},
               {"models_known", p.models_known},
               {"last_loss", p.last_loss},
               {"predicted_loss", p.loss},
               {"low", p.interval.low},
               {"high", p.interval.high},
               {"trusted", p.trusted},
               {"reason", p.reason},
               {"checks", p.checks},
               {"annealed_loss", or_null(p.annealed_loss)},
               {"predictors", Json::array()},
               {"sweep", Json::array()},
               {"trail", Json::array()}};
  for (const Predictor& row : p.predictors)
    json["predictors"].push_back({{"name", row.name},
                                  {"loss", or_null(row.loss)},
                                  {"standard_error", or_null(row.standard_error)},
                                  {"error", or_null(row.error)},
                                  {"error_standard_error", or_null(row.error_standard_error)},
                                  {"recovered", or_null(recovered(p, row))},
                                  {"note", row.note}});
  for (const SweepCell& cell : p.sweep)
    json["sweep"].push_back({{"count", cell.count},
                             {"every_steps", cell.every_steps},
                             {"loss", cell.loss},
                             {"against_last", cell.against_last.mean},
                             {"standard_error", cell.against_last.standard_error}});
  for (const TrailPoint& point : p.trail)
    json["trail"].push_back({{"step", point.step}, {"tokens", or_null(point.tokens)}, {"loss", point.loss}});
  return json;
}

std::string prediction_text(const std::string& run, const Prediction& p) {
  std::string text = heading(run, p) + predictor_rows(p) + sweep_rows(p);
  text += fmt::format("\npredicted annealed loss {:.4f} ({:.4f} to {:.4f}), by '{}':\n{}\n", p.loss, p.interval.low,
                      p.interval.high, p.trusted, p.reason);
  if (p.annealed_loss) {
    const bool inside = *p.annealed_loss >= p.interval.low && *p.annealed_loss <= p.interval.high;
    text += fmt::format("the real anneal reached {:.4f}, {} the interval; the error is {:+.4f}\n", *p.annealed_loss,
                        inside ? "inside" : "outside", p.loss - *p.annealed_loss);
  }
  text += fmt::format("models evaluated: {}, losses known from earlier predictions: {}\n", p.models_evaluated,
                      p.models_known);
  return text;
}

}  // namespace kiln

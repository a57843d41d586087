#include "report/prediction_section.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "base/error.h"
#include "report/plot.h"
#include "report/svg.h"

namespace kiln {
namespace {

constexpr double kShown = 0.25;  // of the run's tokens, at its end: the falls to compare are small beside its start

Series validation_series(const std::string& name, const std::vector<StepMetrics>& metrics, std::size_t colour) {
  Series series{.name = name, .colour = colour};
  for (const StepMetrics& m : metrics) {
    if (!m.valid_loss) continue;
    series.x.push_back(static_cast<double>(m.tokens));
    series.y.push_back(*m.valid_loss);
  }
  return series;
}

/// The branch from the trunk's last validation before it on, so that the line begins where it left the trunk.
Series anneal_series(const RunData& run, const AnnealData& anneal) {
  Series branch = validation_series("anneal " + anneal.name, anneal.metrics, 1);
  const Series trunk = validation_series("", run.metrics, 0);
  std::size_t before = trunk.x.size();
  while (before > 0 &&
         (anneal.metrics.empty() || trunk.x[before - 1] >= static_cast<double>(anneal.metrics.front().tokens)))
    --before;
  if (before == 0) return branch;
  branch.x.insert(branch.x.begin(), trunk.x[before - 1]);
  branch.y.insert(branch.y.begin(), trunk.y[before - 1]);
  return branch;
}

std::string loss_figure(const RunData& run) {
  const Json& p = run.prediction;
  std::vector<Series> all{validation_series("trunk", run.metrics, 0)};
  for (const AnnealData& anneal : run.anneals) all.push_back(anneal_series(run, anneal));
  Series merges{.name = "merges", .mark = Mark::points, .colour = 2};
  for (const Json& point : p.at("trail")) {
    if (point.at("tokens").is_null()) continue;
    merges.x.push_back(point.at("tokens").get<double>());
    merges.y.push_back(point.at("loss").get<double>());
  }
  Series predicted{.name = "predicted", .mark = Mark::points, .colour = 3};
  const double end = p.at("tokens").is_null() ? std::nan("") : p.at("tokens").get<double>();
  predicted.x.push_back(end);
  predicted.y.push_back(p.at("predicted_loss").get<double>());
  all.push_back(merges);
  all.push_back(predicted);

  const double from = run.metrics.empty() ? 0 : kShown * static_cast<double>(run.metrics.back().tokens);
  double high = -std::numeric_limits<double>::infinity();
  for (const Series& series : all)
    for (std::size_t i = 0; i < series.x.size(); ++i)
      if (series.x[i] >= from && std::isfinite(series.y[i])) high = std::max(high, series.y[i]);
  PlotOptions options;
  options.title = "Trunk, anneals and merges";
  options.subtitle = "validation loss; a merge averages a window as long as the anneal";
  options.x.label = "Tokens";
  options.x.min = from;
  options.y.label = "Loss (nats per token)";
  if (std::isfinite(high)) options.y.max = high;
  options.width = 640;
  options.height = 380;
  return svg_plot(options, all);
}

std::string sweep_figure(const Json& p) {
  std::set<std::int64_t> strides, counts;
  for (const Json& cell : p.at("sweep")) {
    strides.insert(cell.at("every_steps").get<std::int64_t>());
    counts.insert(cell.at("count").get<std::int64_t>());
  }
  HeatMap map{.title = "Merges of N snapshots, V steps apart",
              .subtitle = "validation loss minus that of the last snapshot, in nats",
              .row_label = "V",
              .column_label = "N"};
  for (const std::int64_t count : counts) map.columns.push_back(std::to_string(count));
  for (const std::int64_t stride : strides) {
    map.rows.push_back(std::to_string(stride));
    for (const std::int64_t count : counts) {
      double value = std::nan("");
      for (const Json& cell : p.at("sweep"))
        if (cell.at("count") == count && cell.at("every_steps") == stride)
          value = cell.at("against_last").get<double>();
      map.values.push_back(value);
    }
  }
  return map.rows.empty() ? "" : "<figure>" + svg_heat_map(map) + "</figure>\n";
}

std::string sentence(const RunData& run) {
  const Json& p = run.prediction;
  std::string text =
      fmt::format("{}: after an anneal from step {} to {} the loss is predicted as {:.4f} ({:.4f} to {:.4f}) by '{}'",
                  run.name, p.at("anneal").at("begin").get<std::int64_t>(),
                  p.at("anneal").at("end").get<std::int64_t>(), p.at("predicted_loss").get<double>(),
                  p.at("low").get<double>(), p.at("high").get<double>(), p.at("trusted").get<std::string>());
  if (!p.at("annealed_loss").is_null())
    text += fmt::format("; the real anneal reached {:.4f}", p.at("annealed_loss").get<double>());
  return "<p>" + escape_xml(text) + ".</p>\n";
}

}  // namespace

std::string prediction_section(const std::vector<RunData>& runs) {
  std::string out;
  for (const RunData& run : runs) {
    if (run.prediction.is_null()) continue;
    try {
      out += sentence(run) + "<div class=\"figures\">\n<figure>" + loss_figure(run) + "</figure>\n" +
             sweep_figure(run.prediction) + "</div>\n";
    } catch (const nlohmann::json::exception& e) {
      fail(ExitCode::data, "{}: is no prediction of this version ({}); run `kiln predict` again",
           (run.dir / "prediction.json").string(), e.what());
    }
  }
  return out.empty() ? "" : "<h2>Predicted anneals</h2>\n" + out;
}

}  // namespace kiln

#include "merge/prediction.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "merge/memory_merge.h"
#include "merge/weights.h"

namespace kiln {
namespace {

// The 97.5 % quantile of Student's t by the number of errors whose mean square is known; few errors say little.
constexpr std::array<double, 10> kStudent95{12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23};
constexpr int kDraws = 1000;  // of the bootstrap
constexpr std::size_t kTrailPoints = 8;
constexpr double kGuessedError = 0.25;  // of the gap, before any check

/// Merges of a request's snapshots, evaluated.
class Merges {
 public:
  explicit Merges(const PredictionRequest& request) : request_(request) {}

  /// `chosen` are indices of snapshots, oldest first.
  SequenceLosses losses(const std::vector<std::size_t>& chosen, std::span<const double> weights) {
    std::vector<const MergeInput*> inputs;
    for (const std::size_t i : chosen) inputs.push_back(&request_.snapshots[i]);
    return losses_of(inputs, weights);
  }
  SequenceLosses mean_losses(const std::vector<std::size_t>& chosen) {
    return losses(chosen, merge_weights({.method = MergeMethod::sma}, chosen.size()));
  }
  SequenceLosses checkpoint_losses(const std::filesystem::path& directory) {
    const std::vector<MergeInput> inputs = open_inputs({directory}, Hashes::all);
    const MergeInput* const input = &inputs.front();
    const double whole = 1.0;
    return losses_of(std::span(&input, 1), std::span(&whole, 1));
  }

  std::int64_t evaluated() const { return evaluated_; }
  std::int64_t known() const { return known_; }

 private:
  SequenceLosses losses_of(std::span<const MergeInput* const> inputs, std::span<const double> weights) {
    if (request_.known != nullptr)
      if (auto found = request_.known->find(inputs, weights)) {
        ++known_;
        return *std::move(found);
      }
    merge_into(inputs, weights, request_.weights);
    SequenceLosses losses = request_.evaluate();
    if (request_.known != nullptr) request_.known->store(inputs, weights, losses);
    ++evaluated_;
    return losses;
  }

  const PredictionRequest& request_;
  std::int64_t evaluated_ = 0, known_ = 0;
};

std::int64_t step_at(const PredictionRequest& request, std::size_t i) { return request.snapshots[i].step.value_or(0); }

/// Snapshots of steps `begin` to `end`.
std::vector<std::size_t> window(const PredictionRequest& request, std::int64_t begin, std::int64_t end) {
  std::vector<std::size_t> chosen;
  for (std::size_t i = 0; i < request.snapshots.size(); ++i)
    if (step_at(request, i) >= begin && step_at(request, i) <= end) chosen.push_back(i);
  return chosen;
}

/// The anneal's factor of each recorded update between two snapshots: the mean over its steps.
std::vector<double> matched_decay(const PredictionRequest& request, const std::vector<std::size_t>& chosen) {
  std::vector<double> decay;
  for (std::size_t j = 1; j < chosen.size(); ++j) {
    const std::int64_t from = step_at(request, chosen[j - 1]), to = step_at(request, chosen[j]);
    double sum = 0;
    for (std::int64_t step = from + 1; step <= to; ++step) sum += anneal_factor(request.anneal, step);
    decay.push_back(sum / static_cast<double>(to - from));
  }
  return decay;
}

/// Of a paired difference: nothing for one sequence.
std::optional<double> standard_error(const SequenceLosses& a, const SequenceLosses& b) {
  const double error = paired_difference(a, b).standard_error;
  return std::isfinite(error) ? std::optional(error) : std::nullopt;
}

/// A predictor, with the losses by sequence of the model that it is, or that it takes something off.
struct Candidate {
  Predictor predictor;
  std::optional<SequenceLosses> losses;
};

Candidate evaluated(const std::string& name, const std::string& note, SequenceLosses losses,
                    const SequenceLosses& last) {
  return {.predictor = {.name = name,
                        .loss = mean_loss(losses),
                        .standard_error = standard_error(losses, last),
                        .note = note,
                        .error = {}},
          .losses = std::move(losses)};
}

/// Which of the two averages called EMA it is.
std::string definition(const WeightOptions& options) {
  if (options.method == MergeMethod::ema) return fmt::format(", recursion with alpha {}", options.alpha);
  if (options.method == MergeMethod::ema_closed)
    return fmt::format(", closed form with alpha {}, weights divided by their sum", options.alpha);
  return "";
}

/// How many snapshots, as far apart as the closest of the run, are missing between the first and the last of a window.
std::int64_t missing_of(const PredictionRequest& request, const std::vector<std::size_t>& chosen) {
  std::int64_t gap = std::numeric_limits<std::int64_t>::max();
  for (std::size_t i = 1; i < request.snapshots.size(); ++i)
    gap = std::min(gap, step_at(request, i) - step_at(request, i - 1));
  if (gap <= 0) return 0;
  const std::int64_t span = step_at(request, chosen.back()) - step_at(request, chosen.front());
  return span / gap + 1 - static_cast<std::int64_t>(chosen.size());
}

std::string count_of(const PredictionRequest& request, const std::vector<std::size_t>& chosen) {
  const std::int64_t missing = missing_of(request, chosen);
  return fmt::format("{} snapshots{}", chosen.size(), missing > 0 ? fmt::format(" ({} missing)", missing) : "");
}

std::vector<Candidate> window_merges(const PredictionRequest& request, Merges& merges, const SequenceLosses& last) {
  const std::vector<std::size_t> chosen = window(request, request.anneal.begin, request.anneal.end);
  check(chosen.size() >= 2,
        "{} snapshots lie in the anneal's window, steps {} to {}, and 2 or more are needed; take a longer anneal, or "
        "train with a smaller snapshots.every",
        chosen.size(), request.anneal.begin, request.anneal.end);
  const std::vector<double> decay = matched_decay(request, chosen);
  const std::vector<WeightOptions> all{{.method = MergeMethod::sma},
                                       {.method = MergeMethod::wma},
                                       {.method = MergeMethod::ema, .alpha = request.ema_alpha},
                                       {.method = MergeMethod::ema_closed, .alpha = request.ema_alpha},
                                       {.method = MergeMethod::schedule, .decay = decay},
                                       {.method = MergeMethod::qam, .decay = decay}};
  std::vector<Candidate> candidates;
  for (const WeightOptions& options : all)
    candidates.push_back(evaluated(std::string(to_string(options.method)),
                                   count_of(request, chosen) + definition(options),
                                   merges.losses(chosen, merge_weights(options, chosen.size())), last));
  return candidates;
}

/// Evaluates the sweep; the best cell becomes a candidate.
Candidate sweep(const PredictionRequest& request, Merges& merges, const SequenceLosses& last,
                std::vector<SweepCell>& cells) {
  Candidate best{.predictor = {.name = "best of sweep", .note = "no (N, V) fits the snapshots", .error = {}},
                 .losses = {}};
  const std::size_t snapshots = request.snapshots.size();
  for (const std::size_t stride : request.strides)
    for (const std::size_t count : request.counts) {
      if (count < 2 || stride < 1 || (count - 1) * stride >= snapshots) continue;
      std::vector<std::size_t> chosen(count);
      for (std::size_t k = 0; k < count; ++k) chosen[k] = snapshots - 1 - (count - 1 - k) * stride;
      SequenceLosses losses = merges.mean_losses(chosen);
      const std::int64_t span = step_at(request, chosen.back()) - step_at(request, chosen.front());
      cells.push_back({.count = count,
                       .every_steps = span / static_cast<std::int64_t>(count - 1),
                       .against_last = paired_difference(losses, last),
                       .loss = mean_loss(losses)});
      if (best.losses && cells.back().loss >= *best.predictor.loss) continue;
      best = evaluated("best of sweep", fmt::format("N {}, V {} steps", count, cells.back().every_steps),
                       std::move(losses), last);
    }
  return best;
}

std::vector<TrailPoint> trail(const PredictionRequest& request, Merges& merges) {
  std::vector<std::size_t> ends;  // where a whole window of at least two snapshots fits, but the last
  for (std::size_t i = 0; i + 1 < request.snapshots.size(); ++i)
    if (step_at(request, i) - request.anneal.steps() >= step_at(request, 0) &&
        window(request, step_at(request, i) - request.anneal.steps(), step_at(request, i)).size() >= 2)
      ends.push_back(i);
  std::vector<TrailPoint> points;
  const std::size_t count = std::min(kTrailPoints, ends.size());
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t end = ends[k * ends.size() / count];
    const std::int64_t step = step_at(request, end);
    points.push_back({step, request.snapshots[end].tokens,
                      mean_loss(merges.mean_losses(window(request, step - request.anneal.steps(), step)))});
  }
  return points;
}

/// A law's fall of the loss, taken off the last snapshot.
Candidate law_candidate(const PredictionRequest& request, LossLaw law, const SequenceLosses& last) {
  Candidate candidate{.predictor = {.name = std::string(to_string(law))}, .losses = {}};
  Predictor& predictor = candidate.predictor;
  const auto begin = static_cast<std::size_t>(request.anneal.begin), end = static_cast<std::size_t>(request.anneal.end);
  if (request.curves.empty() || request.curves.front().lr.size() < end) {
    predictor.note = "no metrics.jsonl up to the anneal's end";
    return candidate;
  }
  LossLawFit fit;
  try {
    fit = fit_loss_law(law, request.curves);
  } catch (const Error& e) {  // one predictor the less: a run may be too short for a law, and not for a merge
    predictor.note = e.what();
    return candidate;
  }
  if (!fit.knows_decay) {
    predictor.note = "no curve holds a decay yet, so its decay term is unknown";
    return candidate;
  }
  const std::span<const double> trunk = std::span(request.curves.front().lr).first(end);
  std::vector<double> annealed(trunk.begin(), trunk.end());
  for (std::size_t step = begin + 1; step <= end; ++step)
    annealed[step - 1] = trunk[begin - 1] * anneal_factor(request.anneal, static_cast<std::int64_t>(step));
  candidate.losses = last;
  predictor.loss = mean_loss(last) + predict_loss(fit, annealed) - predict_loss(fit, trunk);
  predictor.note =
      fmt::format("fit of {} curves, root mean square {:.4f} of log loss", request.curves.size(), fit.rms_log_error);
  return candidate;
}

/// Earlier checks of anneals of this kind.
std::vector<AnnealCheck> comparable(const PredictionRequest& request) {
  std::vector<AnnealCheck> checks;
  for (const AnnealCheck& check : request.checks)
    if (same_kind(check.anneal, request.anneal)) checks.push_back(check);
  return checks;
}

/// Errors of one predictor over the checks; empty unless all know it.
std::vector<double> errors_of(const std::vector<AnnealCheck>& checks, const std::string& name) {
  std::vector<double> errors;
  for (const AnnealCheck& check : checks)
    if (const auto found = check.errors.find(name); found != check.errors.end()) errors.push_back(found->second);
  return errors.size() == checks.size() ? errors : std::vector<double>{};
}

double mean_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value;
  return sum / static_cast<double>(x.size());
}

double root_mean_square(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return std::sqrt(sum / static_cast<double>(x.size()));
}

/// What earlier anneals of this kind add: the last loss less their mean gap, and the matched merge less its mean error.
/// `others` are of other kinds, whose gaps say nothing about this one's.
std::vector<Candidate> calibrated(const std::vector<AnnealCheck>& checks, std::size_t others, const Candidate& last,
                                  const Candidate& schedule) {
  Candidate gap{.predictor = {.name = "calibrated gap", .note = "no earlier anneal was checked"}, .losses = {}};
  if (others > 0)
    gap.predictor.note =
        fmt::format("no earlier anneal of this shape, final ratio and share was checked; {} of others", others);
  Candidate corrected = gap;
  corrected.predictor.name = "schedule, corrected";
  if (checks.empty()) return {gap, corrected};
  std::vector<double> gaps;
  for (const AnnealCheck& check : checks) gaps.push_back(check.last_loss - check.annealed_loss);
  gap = last;
  gap.predictor.name = "calibrated gap";
  gap.predictor.loss = *last.predictor.loss - mean_of(gaps);
  gap.predictor.standard_error.reset();  // the gap was measured on other models
  gap.predictor.note = fmt::format("mean gap {:.4f} of {} earlier anneals", mean_of(gaps), checks.size());
  if (const std::vector<double> errors = errors_of(checks, "schedule"); !errors.empty()) {
    corrected = schedule;
    corrected.predictor.name = "schedule, corrected";
    corrected.predictor.loss = *schedule.predictor.loss - mean_of(errors);
    corrected.predictor.note = fmt::format("mean error {:+.4f} of {} earlier anneals", mean_of(errors), checks.size());
  }
  return {gap, corrected};
}

/// Fills trusted, reason, loss and interval.
void choose(Prediction& prediction, const std::vector<Candidate>& candidates, const std::vector<AnnealCheck>& checks,
            const SequenceLosses& last) {
  const Candidate* chosen = nullptr;
  double model_error = 0;
  for (const Candidate& candidate : candidates) {
    const std::vector<double> errors = errors_of(checks, candidate.predictor.name);
    if (!candidate.predictor.loss || errors.empty()) continue;
    const double wrong_by = kStudent95[std::min(errors.size(), kStudent95.size()) - 1] * root_mean_square(errors);
    if (chosen != nullptr && wrong_by >= model_error) continue;
    chosen = &candidate;
    model_error = wrong_by;
    prediction.reason = fmt::format(
        "of all predictors it erred least over {} earlier anneal{} of this kind: {:+.4f} on average, {:.4f} root mean "
        "square",
        checks.size(), checks.size() == 1 ? "" : "s", mean_of(errors), root_mean_square(errors));
  }
  if (chosen == nullptr) {
    double low = INFINITY, high = -INFINITY;
    for (const Candidate& candidate : candidates) {
      if (candidate.predictor.name == "schedule") chosen = &candidate;
      if (!candidate.predictor.loss || candidate.predictor.name == "last") continue;
      low = std::min(low, *candidate.predictor.loss);
      high = std::max(high, *candidate.predictor.loss);
    }
    model_error = std::max((high - low) / 2, kGuessedError * std::abs(prediction.last_loss - *chosen->predictor.loss));
    prediction.reason =
        "no earlier anneal of this kind was checked, so the merge that replays the anneal's schedule stands; whether "
        "it lies above or below differs between runs, and --anneal-check measures it";
  }
  prediction.trusted = chosen->predictor.name;
  prediction.loss = *chosen->predictor.loss;
  const bool one_sequence = last.nats.size() < 2;
  if (one_sequence)
    prediction.reason +=
        "; the held-out set is one sequence, so the error over sequences is unknown and the interval leaves it out: "
        "hold out more tokens";
  Interval sampling;
  if (!one_sequence) {
    const Interval drawn = bootstrap_difference(*chosen->losses, last, kDraws, 1);
    const double mean = paired_difference(*chosen->losses, last).mean;
    sampling = {.low = drawn.low - mean, .high = drawn.high - mean};
  }
  prediction.interval = {.low = prediction.loss - std::hypot(sampling.low, model_error),
                         .high = prediction.loss + std::hypot(sampling.high, model_error)};
}

/// Runs the real anneal and fills every predictor's error.
void check_against(const SequenceLosses& annealed, std::vector<Candidate>& candidates, Prediction& prediction) {
  prediction.annealed_loss = mean_loss(annealed);
  for (Candidate& candidate : candidates) {
    Predictor& predictor = candidate.predictor;
    if (!predictor.loss) continue;
    predictor.error = *predictor.loss - *prediction.annealed_loss;
    if (candidate.losses) predictor.error_standard_error = standard_error(*candidate.losses, annealed);
  }
}

}  // namespace

Prediction predict(const PredictionRequest& request) {
  check(!request.snapshots.empty() && request.snapshots.back().step == request.anneal.end,
        "the last snapshot is not of the anneal's end, step {}; choose a step that has a snapshot", request.anneal.end);
  Merges merges(request);
  const std::vector<AnnealCheck> checks = comparable(request);
  const SequenceLosses last = merges.mean_losses({request.snapshots.size() - 1});
  Prediction prediction{.anneal = request.anneal, .tokens = request.snapshots.back().tokens};
  prediction.sequences = static_cast<std::int64_t>(last.nats.size());
  for (const std::int64_t targets : last.targets) prediction.targets += targets;
  prediction.evaluated_in = request.evaluated_in;
  prediction.last_loss = mean_loss(last);
  prediction.checks = checks.size();

  std::vector<Candidate> candidates{evaluated("last", "the last snapshot as it is", last, last)};
  for (Candidate& candidate : window_merges(request, merges, last)) candidates.push_back(std::move(candidate));
  const Candidate schedule = *std::find_if(candidates.begin(), candidates.end(),
                                           [](const Candidate& c) { return c.predictor.name == "schedule"; });
  candidates.push_back(sweep(request, merges, last, prediction.sweep));
  for (const LossLaw law : {LossLaw::mtl, LossLaw::mpl}) candidates.push_back(law_candidate(request, law, last));
  for (Candidate& candidate : calibrated(checks, request.checks.size() - checks.size(), candidates.front(), schedule))
    candidates.push_back(std::move(candidate));
  prediction.trail = trail(request, merges);
  choose(prediction, candidates, checks, last);
  if (request.run_anneal) check_against(merges.checkpoint_losses(request.run_anneal()), candidates, prediction);
  for (const Candidate& candidate : candidates) prediction.predictors.push_back(candidate.predictor);
  prediction.models_evaluated = merges.evaluated();
  prediction.models_known = merges.known();
  return prediction;
}

AnnealCheck check_of(const Prediction& prediction) {
  AnnealCheck check{.anneal = prediction.anneal,
                    .last_loss = prediction.last_loss,
                    .annealed_loss = prediction.annealed_loss.value(),
                    .errors = {}};
  for (const Predictor& predictor : prediction.predictors)
    if (predictor.error) check.errors[predictor.name] = *predictor.error;
  return check;
}

}  // namespace kiln

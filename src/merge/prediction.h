#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "merge/anneal_check.h"
#include "merge/inputs.h"
#include "merge/loss_cache.h"
#include "merge/loss_law.h"
#include "merge/sequence_loss.h"
#include "model/llama.h"

namespace kiln {

/// What is predicted, and from what. Borrows everything.
struct PredictionRequest {
  std::span<const MergeInput> snapshots;  // of a constant rate, oldest first; the last one is of step anneal.end
  Anneal anneal;
  std::vector<std::size_t> counts{2, 3, 5, 10, 15};  // N of the sweep
  std::vector<std::size_t> strides{1, 2, 4, 8};      // V of the sweep, in snapshots
  double ema_alpha = 0.1;
  std::span<const LossCurve> curves;    // of training; the first is the run's own
  std::span<const AnnealCheck> checks;  // of earlier anneals
  /// Merges are made in these weights, and `evaluate` gives their losses on one held-out set, always the same.
  const ModelWeights& weights;
  std::function<SequenceLosses()> evaluate;
  std::string evaluated_in = "f32";  // its precision, for the reader
  const LossCache* known = nullptr;  // losses of earlier predictions; null: every merge is evaluated
  /// Runs the real anneal and returns its checkpoint; empty: no check.
  std::function<std::filesystem::path()> run_anneal;
};

/// One way to tell the annealed loss.
struct Predictor {
  std::string name{};
  std::optional<double> loss{};  // nothing where it cannot tell
  /// Of loss - last, over sequences. Nothing where that difference is no mean over sequences (loss laws, gaps of
  /// earlier anneals), or there is one sequence.
  std::optional<double> standard_error{};
  std::string note{};                            // weights and window, or why it cannot tell
  std::optional<double> error{};                 // loss minus annealed loss, after a check
  std::optional<double> error_standard_error{};  // over sequences
};

/// The mean of `count` snapshots, `every_steps` apart, up to the last.
struct SweepCell {
  std::size_t count = 0;
  std::int64_t every_steps = 0;
  PairedDifference against_last;
  double loss = 0;
};

/// A merge of a window as long as the anneal that ends earlier in the run.
struct TrailPoint {
  std::int64_t step = 0;
  std::optional<std::int64_t> tokens{};
  double loss = 0;
};

struct Prediction {
  Anneal anneal;
  std::optional<std::int64_t> tokens{};                 // at its end
  std::int64_t sequences = 0, targets = 0;              // held out
  std::string evaluated_in{};                           // precision
  std::int64_t models_evaluated = 0, models_known = 0;  // the latter from PredictionRequest::known
  double last_loss = 0;
  std::vector<Predictor> predictors{};
  std::vector<SweepCell> sweep{};
  std::vector<TrailPoint> trail{};
  std::string trusted{}, reason{};        // name of a predictor
  double loss = 0;                        // its prediction
  Interval interval{};                    // about 95 %
  std::size_t checks = 0;                 // earlier anneals of its kind, behind it
  std::optional<double> annealed_loss{};  // after a check
};

/// Predicts the loss after an anneal: the last snapshot's loss, merges over the anneal's window (plain, weighted, both
/// EMAs, matched to its schedule, QAM) and over a sweep of (N, V), loss laws, and what earlier anneals of its kind
/// (same_kind) corrected.
/// Laws say how much the loss will fall; it is taken off the last snapshot's held-out loss.
///
/// Which predictor is trusted: the one with the least root mean square error over those checks; without any, the
/// merge matched to the schedule. The interval joins the standard error over sequences (bootstrap) with what the
/// predictor may be wrong by: Student's t times its root mean square error over the checks, or else half the spread of
/// the predictors, at least a quarter of the predicted gap. One held-out sequence has no error over sequences: the
/// interval is then the predictor's own, and the reason says so. A usage Error when fewer than two snapshots lie in the
/// window; the errors of merge_into, evaluate and run_anneal.
Prediction predict(const PredictionRequest& request);

/// The loss curves of a run directory: its own up to step `end`, and those of its anneals that ended before. Empty
/// without metrics.jsonl; a data Error for a damaged one.
std::vector<LossCurve> read_curves(const std::filesystem::path& run_dir, std::int64_t end);

/// The check that a prediction with a real anneal makes.
AnnealCheck check_of(const Prediction& prediction);

}  // namespace kiln

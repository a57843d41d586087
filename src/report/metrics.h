#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "report/append_file.h"

namespace kiln {

/// Validation loss of an average of weights, by the name of its window.
struct AverageLoss {
  std::string window;
  double loss = 0;
};

/// A run that diverged and went on from the mean of its last checkpoints (`run.on_divergence: merge`). It stands in the
/// metrics of the first step behind it.
struct RescueEvent {
  std::int64_t number = 0;         ///< of the run's rescues, from 1
  std::int64_t step = 0;           ///< that diverged; its line and those before, back to the mean, are gone
  std::int64_t resumed_step = 0;   ///< that the mean stands for: the newest checkpoint's
  std::int64_t oldest_step = 0;    ///< of the checkpoints
  std::int64_t checkpoints = 0;    ///< that were averaged
  std::string optimizer_states{};  ///< "average", or "keep-last": those of the newest
  std::string reason{};
  bool operator==(const RescueEvent&) const = default;
};

/// As `rescue` of metrics.jsonl and `rescued_from` of a rescue's state.json hold it.
Json to_json(const RescueEvent& event);
/// A nlohmann::json::exception where a key is missing or of the wrong type.
RescueEvent rescue_event(const Json& json);
/// "rescue 1, step 57: mean of 3 checkpoints, steps 45 to 55, optimizer states averaged; went on after step 55
/// (REASON)"
std::string to_string(const RescueEvent& event);

/// What one training step reports. NaN stands for a value that is not finite or not known.
struct StepMetrics {
  std::int64_t step = 0;           ///< 1 after the first update
  std::int64_t tokens = 0;         ///< trained on so far, over all ranks
  double loss = 0;                 ///< mean cross-entropy of the step's tokens, nats
  double lr = 0;                   ///< learning rate of the step
  double grad_norm = 0;            ///< global L2 norm before clipping
  double step_ms = 0;              ///< wall-clock time of the step
  double tokens_per_s = 0;         ///< over all ranks
  double mfu = 0;                  ///< model FLOP utilisation, 0 to 1
  std::uint64_t memory_bytes = 0;  ///< peak of one rank so far
  std::optional<double> valid_loss{};
  std::vector<AverageLoss> average_loss{};  ///< of the windows that the step completed
  std::optional<double> average_ms{};       ///< that averaging held the step up; where weights were taken
  std::optional<RescueEvent> rescue{};      ///< that the run went on from to this step
};

/// The one list of keys, in the order of metrics.jsonl: writing, reading and TensorBoard visit it.
template <typename Metrics, typename Visit>
void visit_fields(Metrics& metrics, Visit visit) {
  visit("step", metrics.step);
  visit("tokens", metrics.tokens);
  visit("loss", metrics.loss);
  visit("lr", metrics.lr);
  visit("grad_norm", metrics.grad_norm);
  visit("step_ms", metrics.step_ms);
  visit("tokens_per_s", metrics.tokens_per_s);
  visit("mfu", metrics.mfu);
  visit("memory_bytes", metrics.memory_bytes);
  visit("valid_loss", metrics.valid_loss);
  visit("average_loss", metrics.average_loss);
  visit("average_ms", metrics.average_ms);
  visit("rescue", metrics.rescue);
}

/// Appends one JSON object a line to RUN_DIR/metrics.jsonl; values that are not finite are written as null.
class MetricsWriter {
 public:
  /// Makes the directory when needed. `resume_step` k > 0: the lines of later steps and a half-written last line are
  /// dropped (the file is replaced atomically), so that it goes on as if the run had never stopped; 0 starts afresh.
  /// A data Error for a line that cannot be read, with file:line.
  MetricsWriter(const std::filesystem::path& run_dir, std::int64_t resume_step);

  /// One write() call, no allocation (but for a rescue). A resource Error when the disk is full.
  void write(const StepMetrics& metrics);

 private:
  AppendFile file_;
};

/// All lines of a metrics.jsonl; null reads as NaN, unknown keys are skipped. A half-written last line (one without its
/// newline) is skipped too; any other line that cannot be read is a data Error with file:line.
std::vector<StepMetrics> read_metrics(const std::filesystem::path& path);

}  // namespace kiln

#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "report/append_file.h"

namespace kiln {

/// Validation loss of an average of weights, by the name of its window.
struct AverageLoss {
  std::string window;
  double loss = 0;
};

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
}

/// Appends one JSON object a line to RUN_DIR/metrics.jsonl; values that are not finite are written as null.
class MetricsWriter {
 public:
  /// Makes the directory when needed. `resume_step` k > 0: the lines of later steps and a half-written last line are
  /// dropped (the file is replaced atomically), so that it goes on as if the run had never stopped; 0 starts afresh.
  /// A data Error for a line that cannot be read, with file:line.
  MetricsWriter(const std::filesystem::path& run_dir, std::int64_t resume_step);

  /// One write() call, no allocation. A resource Error when the disk is full.
  void write(const StepMetrics& metrics);

 private:
  AppendFile file_;
};

/// All lines of a metrics.jsonl; null reads as NaN, unknown keys are skipped. A half-written last line (one without its
/// newline) is skipped too; any other line that cannot be read is a data Error with file:line.
std::vector<StepMetrics> read_metrics(const std::filesystem::path& path);

}  // namespace kiln

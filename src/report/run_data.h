#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "report/metrics.h"

namespace kiln {

/// A real anneal that branched off a run.
struct AnnealData {
  std::string name{};  ///< of its directory
  std::vector<StepMetrics> metrics{};
};

/// What a run directory holds: metrics.jsonl, and where present config.yaml (as text), summary.json, prediction.json
/// and anneals/.
struct RunData {
  std::filesystem::path dir{};
  std::string name{};       ///< of summary.json, otherwise the directory's
  std::string optimizer{};  ///< of summary.json, otherwise `optimizer: kind:` of config.yaml, otherwise ""
  std::string config{};
  std::vector<StepMetrics> metrics{};
  std::optional<double> final_valid_loss{};   ///< of summary.json, otherwise the last one in the metrics
  std::optional<double> last_valid_loss{};    ///< of the last checkpoint before merging
  std::optional<double> merged_valid_loss{};  ///< of the merged snapshots
  std::optional<double> state_bytes{};        ///< of the optimizer
  std::optional<double> tokens_per_s{};       ///< of summary.json, otherwise the median of the metrics
  std::optional<double> parameters{};
  Json prediction{};  ///< null where nothing was predicted
  std::vector<AnnealData> anneals{};
};

/// A data Error names the file and what is wrong with it; metrics.jsonl alone must exist.
RunData load_run(const std::filesystem::path& dir);

/// Mean loss of the last `count` steps that have one (fewer when there are fewer); nothing when there is none.
std::optional<double> final_train_loss(const RunData& run, std::size_t count);

/// Highest memory_bytes of the metrics; 0 when there are none.
std::uint64_t peak_memory_bytes(const RunData& run);

/// Seconds of training at the end of each step, from step_ms.
std::vector<double> elapsed_seconds(const RunData& run);

}  // namespace kiln

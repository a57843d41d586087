#pragma once
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "core/worker.h"
#include "train/config.h"
#include "train/device_memory.h"
#include "train/run_position.h"

namespace kiln {

/// The mean of a window's weights. Borrows from Averages until its next call.
struct FinishedAverage {
  std::string name;                // of its window
  bool evaluate = true;            // whether its loss is asked for
  std::vector<RunPosition> taken;  // where its weights stood, oldest first
  const ModelWeights* weights;     // f32; written on the rank that keeps sums, for the others to fill if `evaluate`,
                                   // null where nobody needs them
  bool finite = true;              // as far as this rank knows
};
/// merge.json of an average, as a merge of snapshots of those steps writes it, with the window's name for their paths.
Json provenance(const FinishedAverage& average);

/// Means of the weights while they are trained: each window of the configuration takes them every `every` steps, and
/// gives their mean after `count` times, the same bits as `kiln merge --method sma` of fp32 snapshots of those steps
/// (core/weighted_sum.h). Sums are fp64 and lie in host memory, on one rank; the others count alike, so that all know
/// what is due. Where the host trains, it adds the weights at once. Elsewhere take() starts a HostCopy, and a thread
/// adds them up while the device trains on.
///
/// paper  the merges of arXiv:2505.12082 without their snapshots
class Averages {
 public:
  /// The weights must outlive it. A resource Error when the host's memory does not suffice.
  Averages(const Config& config, const DeviceWeights& weights, bool keeps_sums);
  ~Averages();

  /// Call after every step was handed to the device, and before the next one. Gives the milliseconds that the caller
  /// was held up; nothing when no window was due. A window that is full must be finished before.
  std::optional<double> take(const RunPosition& at);
  /// Windows that have all their weights.
  std::vector<std::size_t> full() const;
  bool any_full() const;
  /// Rounds the mean of a full window, which then begins anew. A diverged Error when it is not finite.
  FinishedAverage finish(std::size_t window);

  /// Sums and positions of windows under way, as `averages.safetensors` of a checkpoint; no file when there are none.
  void save(const std::filesystem::path& directory);
  /// Goes on from them; windows that the file does not know begin anew, as all do without one. A data Error when it
  /// belongs to another model.
  void load(const std::filesystem::path& directory);

 private:
  struct Window {
    AverageWindow options;
    std::string name;
    std::vector<RunPosition> taken;
    std::vector<double> sums;  // parameter after parameter; empty where none are kept
  };
  bool due(const Window& window, std::int64_t step) const;
  void add(Window& window, const ModelWeights& weights, bool first) const;
  std::span<double> sums_of(Window& window, std::size_t parameter) const;

  Config config_;
  const DeviceWeights& weights_;
  bool keeps_sums_;
  std::vector<std::size_t> offsets_;  // of each parameter's sums
  std::vector<Window> windows_;
  std::unique_ptr<ModelWeights> scratch_;  // what came from the device, and the mean
  std::unique_ptr<HostCopy> copy_;
  std::unique_ptr<Worker> worker_;  // last: it uses the others
};

/// Host bytes of the rank that keeps the sums: 8 for each parameter and window, 4 for the mean, and on a GPU the
/// page-locked copy of its `device_weight_bytes`.
std::uint64_t average_host_bytes(const Config& config, std::uint64_t device_weight_bytes, const Backend& backend);

}  // namespace kiln

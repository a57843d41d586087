#pragma once
#include <functional>
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

/// The mean of a window's weights.
struct FinishedAverage {
  std::string name{};                     // of its window
  std::vector<RunPosition> taken{};       // where its weights stood, oldest first
  const ModelWeights* weights = nullptr;  // f32; filled on the rank that keeps sums, for the others to fill where its
                                          // loss is asked for, null where nobody needs them
  bool finite = true;                     // as far as this rank knows
};
/// merge.json of an average, as a merge of snapshots of those steps writes it, with the window's name for their paths.
Json provenance(const FinishedAverage& average);

/// Means of the weights while they are trained: each window of the configuration takes them every `every` steps, and
/// gives their mean after `count` times, the same bits as `kiln merge --method sma` of fp32 snapshots of those steps
/// (core/weighted_sum.h). Sums are fp64 and lie in host memory, on one rank; the others count alike, so that all know
/// what is due. Where the host trains, it adds the weights at once. Elsewhere take() starts a HostCopy, and a thread
/// adds them up, and rounds the mean of a window that is complete, while the device trains on. A mean lies in memory of
/// its own and is written by a thread of its window, after its evaluation where its loss is asked for (`eval: true` and
/// data.valid), so that the window goes on at once. What goes wrong on these threads is thrown by the next take(),
/// also where no window is due, or by settle() or save().
///
/// paper  the merges of arXiv:2505.12082 without their snapshots
class Averages {
 public:
  /// Puts a mean on disk; called on another thread.
  using Write = std::function<void(const FinishedAverage&)>;

  /// The weights must outlive it. A resource Error when the host's memory does not suffice.
  Averages(const Config& config, const DeviceWeights& weights, bool keeps_sums, Write write);
  ~Averages();

  /// Call after every step was handed to the device, and before the next one. Gives the milliseconds that the caller
  /// was held up; nothing when no window was due. The means that to_evaluate() names must be evaluated before.
  std::optional<double> take(const RunPosition& at);
  /// Windows whose mean is complete and whose loss is asked for.
  std::vector<std::size_t> to_evaluate() const;
  /// Waits for that mean, shows it to `evaluate`, and has it written; if `evaluate` throws, it is not.
  void evaluate(std::size_t window, const std::function<void(const FinishedAverage&)>& evaluate);
  /// Waits until every mean is written, but those that are not finite: gives the first of them.
  std::optional<FinishedAverage> settle();

  /// Waits until means are written. Then sums and positions of windows under way, as `averages.safetensors` of a
  /// checkpoint; no file when there are none.
  void save(const std::filesystem::path& directory);
  /// Goes on from them; windows that the file does not know begin anew, as all do without one. A data Error when it
  /// belongs to another model.
  void load(const std::filesystem::path& directory);

 private:
  struct Window {
    AverageWindow options;
    bool evaluates = false;
    std::vector<RunPosition> taken{};
    std::vector<double> sums{};            // parameter after parameter; empty where none are kept
    std::unique_ptr<ModelWeights> mean{};  // null where nobody needs it
    FinishedAverage finished{};
    bool waits = false;                // for its evaluation
    std::unique_ptr<Worker> writer{};  // last: it reads the mean
  };
  /// Weights that a window takes.
  struct Sample {
    Window* window;
    bool first, last;
  };
  bool due(const Window& window, std::int64_t step) const;
  Sample count(Window& window, const RunPosition& at) const;
  void add(const std::vector<Sample>& samples, const ModelWeights& weights);
  void round(Window& window);
  void hand_over(Window& window);
  bool failed() const;
  void wait();
  std::span<double> sums_of(Window& window, std::size_t parameter) const;

  Config config_;
  const DeviceWeights& weights_;
  bool keeps_sums_;
  std::vector<std::size_t> offsets_;  // of each parameter's sums
  Write write_;
  std::optional<FinishedAverage> not_finite_;  // the first
  std::vector<Window> windows_;                // never moved: jobs point at them
  std::unique_ptr<ModelWeights> scratch_;      // what came from the device; null where the host trains
  std::unique_ptr<HostCopy> copy_;
  std::unique_ptr<Worker> worker_;  // last: it uses the others
};

/// Host bytes of the rank that keeps the sums: for each parameter and window 8, and 4 for the mean; on a GPU 4 more for
/// each parameter, and the page-locked copy of its `device_weight_bytes`.
std::uint64_t average_host_bytes(const Config& config, std::uint64_t device_weight_bytes, const Backend& backend);

}  // namespace kiln

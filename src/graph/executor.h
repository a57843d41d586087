#pragma once
#include <vector>

#include "graph/packing.h"

namespace kiln {

/// Binds a plan to memory on the CPU and runs it. After construction and binding, run() allocates nothing.
/// Not thread-safe; the plan must outlive it.
class Executor {
 public:
  /// Packs the plan and allocates its arena (a resource Error says how many bytes it needs).
  Executor(const Plan& plan, int micro_batches);

  /// Gives an external value its memory; a usage Error when specs differ or the value is not external.
  void bind(ValueId id, const Tensor& tensor);
  /// The memory of any value. Arena values hold what the last run left only if they were kept.
  Tensor tensor(ValueId id) const { return tensors_[static_cast<std::size_t>(id.index)]; }

  /// Runs the nodes of a phase in order. `accumulate` is true for micro-batches after the first of a step.
  void run(Phase phase, bool accumulate);
  /// Fills the arena with NaN patterns, so that a read of what nobody wrote shows (tests).
  void poison();

  /// Seconds spent in each node since the last reset, when profiling is on.
  void set_profiling(bool on);
  const std::vector<double>& node_seconds() const { return seconds_; }
  const Packing& packing() const { return packing_; }

 private:
  struct Bound {
    std::vector<Tensor> in, out;
    Tensor workspace;
    bool accumulates = false;  // writes a parameter's gradient
  };
  void rebind();

  const Plan& plan_;
  Packing packing_;
  Buffer arena_;
  std::vector<Tensor> tensors_;
  std::vector<Bound> bound_;
  std::vector<double> seconds_;
  bool stale_ = true;
  bool profiling_ = false;
};

}  // namespace kiln

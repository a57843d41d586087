#pragma once
#include <vector>

#include "graph/backend.h"
#include "graph/packing.h"

namespace kiln {

/// A usage Error where the device has no kernel for a node; takes no memory.
void check_kernels(const Plan& plan, const Backend& backend);

/// Binds a plan to memory on a device and runs it. After construction, binding and a first run, run() allocates
/// nothing. Not thread-safe; plan and backend must outlive it.
class Executor {
 public:
  /// Packs the plan and allocates its arena (a resource Error says how many bytes it needs).
  Executor(const Plan& plan, int micro_batches, Backend& backend = cpu_backend());

  /// Gives an external value its memory; a usage Error when specs differ or the value is not external.
  void bind(ValueId id, const Tensor& tensor);
  /// The memory of any value. Arena values hold what the last run left only if they were kept.
  Tensor tensor(ValueId id) const { return tensors_[static_cast<std::size_t>(id.index)]; }

  /// Enqueues the nodes of a phase in order. `accumulate` is true for micro-batches after the first of a step.
  void run(Phase phase, bool accumulate);
  /// Fills the arena with NaN patterns, so that a read of what nobody wrote shows (tests).
  void poison();

  /// With profiling on, node_seconds() holds the time spent in each node since then (of a group: at its first node).
  void set_profiling(bool on);
  const std::vector<double>& node_seconds();
  const Packing& packing() const { return packing_; }
  Backend& backend() const { return backend_; }
  const Plan& plan() const { return plan_; }

 private:
  /// A group of nodes, its kernel and what it is called with.
  struct Step {
    NodeGroup group;
    Phase phase;
    std::unique_ptr<Kernel> kernel;
    std::vector<std::vector<Tensor>> in, out;  // by node
    std::vector<KernelArgs> args;              // by node
    std::vector<bool> accumulates;             // by node: adds up over micro-batches
    bool stale = true;
  };
  struct Mark {
    std::size_t node, begin, end;
  };
  void rebind(Step& step);

  const Plan& plan_;
  Backend& backend_;
  Packing packing_;
  Buffer arena_;
  std::vector<Tensor> tensors_;
  std::vector<Step> steps_;
  std::vector<std::vector<std::size_t>> users_;  // by value: steps that touch it
  std::vector<double> seconds_;
  std::vector<Mark> marks_;
  bool profiling_ = false;
};

}  // namespace kiln

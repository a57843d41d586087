#pragma once
#include "dist/communicator.h"
#include "graph/op.h"

namespace kiln {

/// Sum of one tensor over the ranks, in place.
///
/// in     x, any shape, f32|f64; every rank records the same plan
/// stream blocks the host on the CPU; with NCCL it is enqueued on the communicator's stream
/// The communicator must outlive the op.
class AllReduce final : public Op {
 public:
  explicit AllReduce(Communicator& communicator) : communicator_(communicator) {}
  std::string_view name() const override { return "all_reduce"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::vector<int> mutates() const override { return {0}; }
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  bool any_device() const override { return true; }

 private:
  Communicator& communicator_;
};

}  // namespace kiln

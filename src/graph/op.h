#pragma once
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace kiln {

class GradientContext;
struct ValueId;

/// Work of one node: what `kiln bench` and MFU count.
struct Cost {
  double flops = 0;
  double bytes = 0;  // least traffic: every input read once, every output written once
};

/// What a kernel receives. Kernels assume; shapes were checked when the plan was built.
struct KernelArgs {
  std::span<const Tensor> in;
  std::span<const Tensor> out;
  Tensor workspace{};       // u8, at least workspace_bytes(); a group's nodes share it
  bool accumulate = false;  // a parameter gradient adds to what is there (micro-batches after the first)
};

/// One operation: contract, shape rule, gradient rule and CPU kernel. Immutable, shared between plans.
/// A device's kernel for it is looked up by name() (kernels/).
class Op {
 public:
  virtual ~Op() = default;
  virtual std::string_view name() const = 0;
  /// Output specs; a usage Error with the shapes when the inputs do not fit.
  virtual std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const = 0;
  /// Appends the nodes that compute input gradients. The default refuses, naming the op.
  virtual void gradient(GradientContext& context) const;
  /// Appends a node that gives `output` once more from inputs and other outputs, for an op that can at a small part of
  /// its own cost. Invalid: the whole node runs again (Plan::recompute).
  virtual ValueId recompute(GradientContext& context, int output) const;
  /// Indices of inputs that the kernel also writes (in place).
  virtual std::vector<int> mutates() const { return {}; }
  /// Adds to what its inputs hold in micro-batches after the first, as nodes that write parameter gradients do.
  virtual bool accumulates() const { return false; }
  /// Scratch for one run on the CPU; it lives during this node only. Other devices say their own (graph/backend.h).
  virtual std::size_t workspace_bytes(std::span<const TensorSpec>) const { return 0; }
  virtual Cost cost(std::span<const TensorSpec>) const { return {}; }
  virtual void run_cpu(const KernelArgs& args) const = 0;
  /// run_cpu() serves every device: the op hands its tensors to something that knows where they live (a communicator).
  virtual bool any_device() const { return false; }
};

using OpPtr = std::shared_ptr<const Op>;

}  // namespace kiln

#pragma once
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace kiln {

class GradientContext;

/// Work of one node: what `kiln bench` and MFU count.
struct Cost {
  double flops = 0;
  double bytes = 0;  // least traffic: every input read once, every output written once
};

/// What a kernel receives. Kernels assume; shapes were checked when the plan was built.
struct KernelArgs {
  std::span<const Tensor> in;
  std::span<const Tensor> out;
  Tensor workspace;         // u8, at least workspace_bytes()
  bool accumulate = false;  // a parameter gradient adds to what is there (micro-batches after the first)
  void* stream = nullptr;   // the device's stream; unused on the CPU
};

/// One operation: contract, shape rule, gradient rule and CPU kernel. Immutable, shared between plans.
/// A CUDA kernel for it is looked up by name() in kernels/.
class Op {
 public:
  virtual ~Op() = default;
  virtual std::string_view name() const = 0;
  /// Output specs; a usage Error with the shapes when the inputs do not fit.
  virtual std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const = 0;
  /// Appends the nodes that compute input gradients. The default refuses, naming the op.
  virtual void gradient(GradientContext& context) const;
  /// Indices of inputs that the kernel also writes (in place).
  virtual std::vector<int> mutates() const { return {}; }
  /// Scratch for one run; it lives during this node only.
  virtual std::size_t workspace_bytes(std::span<const TensorSpec>) const { return 0; }
  virtual Cost cost(std::span<const TensorSpec>) const { return {}; }
  virtual void run_cpu(const KernelArgs& args) const = 0;
};

using OpPtr = std::shared_ptr<const Op>;

}  // namespace kiln

#pragma once
#include "graph/op.h"

namespace kiln {

/// Global L2 norm of all gradients, and the factor that clips it: min(1, clip_norm / (norm + 1e-6)), as PyTorch's
/// clip_grad_norm_; clip_norm 0 leaves the factor at 1.
///
/// in     gradients f32|f64|bf16..., scalars last; writes Scalar::grad_norm and Scalar::clip_scale
/// out    none; sums in f64, in an order that depends on the sizes alone. A gradient or a Scalar::loss that is not
///        finite makes the norm not finite, which stops the updates of the step.
class GradientNorm final : public Op {
 public:
  struct Options {
    double clip_norm = 1.0;
    /// Adds to the squares that Scalar::grad_norm already stands for: one node a gradient, where the updates do not
    /// wait for all of them. Clipping is then impossible.
    bool running = false;
  };
  explicit GradientNorm(Options options);
  std::string_view name() const override { return "gradient_norm"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const Options& options() const { return options_; }

 private:
  Options options_;
};

}  // namespace kiln

#pragma once
#include "graph/plan.h"

namespace kiln {

/// y = silu(gate) * up, silu(x) = x / (1 + e^-x), with gate and up side by side in one tensor.
///
/// in     x [N,2F] f32|f64|bf16: columns [0,F) gate, [F,2F) up
/// out    y [N,F]
/// grad   dx, from x and dy
/// paper  Shazeer 2020, arXiv:2002.05202
class SwiGlu final : public Op {
 public:
  std::string_view name() const override { return "swiglu"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

/// in x [N,2F], dy [N,F]; out dx [N,2F].
class SwiGluGradient final : public Op {
 public:
  std::string_view name() const override { return "swiglu_dx"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

}  // namespace kiln

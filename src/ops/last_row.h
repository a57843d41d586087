#pragma once
#include "graph/plan.h"

namespace kiln {

/// The last row of a matrix: the only one whose logits generation needs. Not differentiable.
///
/// in     x [N,C] f32|f64|bf16, N >= 1
/// out    y [1,C]
class LastRow final : public Op {
 public:
  std::string_view name() const override { return "last_row"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

}  // namespace kiln

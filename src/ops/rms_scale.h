#pragma once
#include "graph/plan.h"

namespace kiln {

/// The output of RmsNorm once more, from what it keeps for its gradient: y = r * rstd * w, with the same bits. Not
/// differentiable; recomputation alone records it.
///
/// in     r [N,C] f32|f64|bf16    w [C]    rstd [N], f32 for bf16
/// out    y [N,C]
/// error  lengths of w and rstd; on CUDA as RmsNorm
class RmsScale final : public Op {
 public:
  std::string_view name() const override { return "rms_scale"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

}  // namespace kiln

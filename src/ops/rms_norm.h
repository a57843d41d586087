#pragma once
#include "graph/plan.h"

namespace kiln {

/// RMS normalisation, with the residual addition before it fused in:
///   r = x + delta (or x alone),  rstd = 1 / sqrt(mean_C(r^2) + eps),  y = r * rstd * w.
///
/// in     x [N,C] f32|f64|bf16    w [C]    delta [N,C] with `residual`
/// out    y [N,C]    rstd [N], f32 for bf16, kept for backward    r [N,C] with `residual`
/// grad   dx, dw; dw summed over N in a fixed order. With `residual` dx is the gradient of both x and delta, and
///        takes in what arrives at r.
/// error  w length differs from C, eps <= 0
/// paper  Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
class RmsNorm final : public Op {
 public:
  struct Options {
    double eps = 1e-6;
    bool residual = false;
  };
  explicit RmsNorm(Options options);
  std::string_view name() const override { return options_.residual ? "add_rms_norm" : "rms_norm"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  /// y from r and rstd, where those are not recomputed themselves (ops/rms_scale.h).
  ValueId recompute(GradientContext& context, int output) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const Options& options() const { return options_; }

 private:
  Options options_;
};

/// in r [N,C], w [C], rstd [N], dy [N,C], and dr [N,C] when one arrives; out dx [N,C] (+ dr), dw [C], f32 for bf16.
class RmsNormGradient final : public Op {
 public:
  std::string_view name() const override { return "rms_norm_dx"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

}  // namespace kiln

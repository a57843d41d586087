#pragma once
#include "graph/plan.h"

namespace kiln {

/// y = x W'. One fused weight serves several projections (q, k and v; gate and up): their rows lie one after another.
///
/// in     x [N,K] f32|f64|bf16    w [M,K]
/// out    y [N,M]
/// grad   dx = dy W    dw = dy' x, summed over N; added to the gradient that stands when W is used twice
/// error  inner sizes differ
class Linear final : public Op {
 public:
  /// `gradients`: dtype of dw for bf16 weights, f32 or bf16, in which sums over micro-batches would be rounded.
  explicit Linear(DType gradients = DType::f32) : gradients_(gradients) {}
  std::string_view name() const override { return "linear"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;

 private:
  DType gradients_;
};

/// in dy [N,M], w [M,K]; out dx [N,K].
class LinearInputGradient final : public Op {
 public:
  std::string_view name() const override { return "linear_dx"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

/// in dy [N,M], x [N,K]; out dw [M,K], f32 for bf16, or bf16 where asked for. With `add`, a third input dw is added to
/// in place and there is no output.
class LinearWeightGradient final : public Op {
 public:
  explicit LinearWeightGradient(bool add, DType of_bf16 = DType::f32) : add_(add), of_bf16_(of_bf16) {}
  std::string_view name() const override { return "linear_dw"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::vector<int> mutates() const override { return add_ ? std::vector<int>{2} : std::vector<int>{}; }
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;

 private:
  DType dtype(const TensorSpec& dy) const { return dy.dtype == DType::bf16 ? of_bf16_ : dy.dtype; }
  bool add_;
  DType of_bf16_;
};

}  // namespace kiln

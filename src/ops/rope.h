#pragma once
#include "graph/plan.h"
#include "ops/attention_shape.h"

namespace kiln {

/// Rotary position embedding of the query and key heads of a fused projection, in place, as Hugging Face lays it out
/// (rotate-half): with (a, b) elements i and i + D/2 of a head at position p and angle t = p * base^(-2i/D),
///   a' = a cos t - b sin t,   b' = b cos t + a sin t.
///
/// in     qkv [N,(H+2Hkv)D] f32|f64|bf16, rotated in place    table [P,D], f32 for bf16: cos in [0,D/2), sin in [D/2,D)
///        first [1] i32: position of row 0 of each sequence (0 in training, tokens so far when generating)
/// grad   the inverse rotation of the gradient, in place
/// error  odd D, N not a multiple of T, P < T
/// paper  Su et al. 2021, arXiv:2104.09864
class Rope final : public Op {
 public:
  enum class Direction { forward, inverse };
  Rope(AttentionShape shape, Direction direction) : shape_(shape), direction_(direction) {}
  std::string_view name() const override { return direction_ == Direction::forward ? "rope" : "rope_dx"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  std::vector<int> mutates() const override { return {0}; }
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const AttentionShape& shape() const { return shape_; }
  Direction direction() const { return direction_; }

 private:
  AttentionShape shape_;
  Direction direction_;
};

/// Fills a table for positions [0, P), in double precision and rounded once.
void fill_rope_table(const Tensor& table, double base);

}  // namespace kiln

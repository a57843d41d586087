#pragma once
#include "graph/plan.h"
#include "ops/attention_shape.h"

namespace kiln {

/// Causal grouped-query attention, o_i = sum_{j<=i} softmax_j(q_i k_j / sqrt(D)) v_j, within each sequence of T rows.
/// Scores live in tiles of 64 queries: memory grows with T, never with T^2.
///
/// in     qkv [N,(H+2Hkv)D] f32|f64|bf16, after RoPE
/// out    o [N,HD]    lse [N,H], f32 for bf16: log of the softmax denominator, kept for backward
/// grad   dqkv, from qkv, o, lse and do; a key head's gradient sums its query heads in order
/// error  H not a multiple of Hkv, N not a multiple of T
/// paper  Dao 2023, arXiv:2307.08691 (tiling and the recomputed softmax); Ainslie et al. 2023, arXiv:2305.13245 (GQA)
class Attention final : public Op {
 public:
  explicit Attention(AttentionShape shape) : shape_(shape) {}
  std::string_view name() const override { return "attention"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const AttentionShape& shape() const { return shape_; }

 private:
  AttentionShape shape_;
};

/// in qkv, o, lse, do; out dqkv.
class AttentionGradient final : public Op {
 public:
  explicit AttentionGradient(AttentionShape shape) : shape_(shape) {}
  std::string_view name() const override { return "attention_dx"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const AttentionShape& shape() const { return shape_; }

 private:
  AttentionShape shape_;
};

/// Attention of one sequence over a KV cache, for generation. Not differentiable.
///
/// in     qkv [N,(H+2Hkv)D]: N new tokens, after RoPE    keys, values [P,Hkv D]: the cache, rows [first, first + N) are
///        written    first [1] i32: tokens already in the cache
/// out    o [N,HD]
/// error  as Attention; first + N > P is checked by the caller, which knows both
class CachedAttention final : public Op {
 public:
  explicit CachedAttention(AttentionShape shape) : shape_(shape) {}
  std::string_view name() const override { return "cached_attention"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::vector<int> mutates() const override { return {1, 2}; }
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const AttentionShape& shape() const { return shape_; }

 private:
  AttentionShape shape_;
};

}  // namespace kiln

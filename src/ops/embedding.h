#pragma once
#include "graph/plan.h"

namespace kiln {

/// y_n = W[token_n].
///
/// in     tokens [N] i32, each in [0,V)    w [V,C] f32|f64|bf16
/// out    y [N,C]
/// grad   dw: rows added in token order, so the sum is deterministic; rows that no token names get zero
/// error  shapes; the range of tokens is checked where data enters (io/dataset.h), not here
class Embedding final : public Op {
 public:
  std::string_view name() const override { return "embedding"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
};

/// in tokens [N], dy [N,C]; out dw [vocab,C], f32 for bf16. With `add`, a third input dw is added to in place (tied
/// head).
class EmbeddingGradient final : public Op {
 public:
  EmbeddingGradient(std::int64_t vocab, bool add) : vocab_(vocab), add_(add) {}
  std::string_view name() const override { return "embedding_dw"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::vector<int> mutates() const override { return add_ ? std::vector<int>{2} : std::vector<int>{}; }
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;

 private:
  std::int64_t vocab_;
  bool add_;
};

}  // namespace kiln

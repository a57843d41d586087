#pragma once
#include <algorithm>

#include "graph/executor.h"
#include "model/llama.h"
#include "ops/rope.h"

namespace kiln {

/// A recorded model with its memory: what the model tests run. The weights must outlive it.
class LlamaRun {
 public:
  LlamaRun(const ModelWeights& weights, DType dtype, BatchShape shape, LlamaOutput output, Recomputation recompute = {})
      : weights_(weights),
        tokens_({{shape.tokens()}, DType::i32}),
        targets_({{shape.tokens()}, DType::i32}),
        first_({{1}, DType::i32}),
        rope_table_({{shape.seq_len, weights.config().head_dim}, dtype}),
        scalars_(scalars_spec()) {
    values_ = record_llama(plan_, weights.config(), dtype, shape, output, shape.seq_len, recompute);
    if (output == LlamaOutput::losses_and_gradients) {
      plan_.backward(values_.losses);
      for (const ValueId storage : values_.storages) plan_.keep(plan_.gradient(storage));
    }
    executor_ = std::make_unique<Executor>(plan_, 1);
    executor_->poison();
    fill_rope_table(rope_table_.view(), weights.config().rope_base);
    for (std::size_t s = 0; s < values_.storages.size(); ++s) executor_->bind(values_.storages[s], weights.storage(s));
    executor_->bind(values_.tokens, tokens_.view());
    executor_->bind(values_.first, first_.view());
    executor_->bind(values_.rope_table, rope_table_.view());
    if (!values_.targets.valid()) return;
    executor_->bind(values_.targets, targets_.view());
    executor_->bind(values_.scalars, scalars_.view());
  }

  /// Fills in tokens and targets, and the gradients' scale: one over the number of targets that count.
  void set_batch(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets) {
    std::ranges::copy(tokens, tokens_.span<std::int32_t>().begin());
    std::ranges::copy(targets, targets_.span<std::int32_t>().begin());
    const auto counted = std::ranges::count_if(targets, [](std::int32_t t) { return t >= 0; });
    scalar(scalars_.view(), Scalar::loss_scale) = 1.0 / static_cast<double>(counted);
  }
  void run() { executor_->run(Phase::micro, false); }

  /// Mean loss of the last run.
  double loss() const {
    const Tensor losses = executor_->tensor(values_.losses);
    double sum = 0;
    visit_real(losses.dtype(), [&]<typename T>() {
      for (const T each : losses.span<T>()) sum += static_cast<double>(each);
    });
    return sum * scalar(scalars_.view(), Scalar::loss_scale);
  }
  Tensor losses() const { return executor_->tensor(values_.losses); }
  const Plan& plan() const { return plan_; }
  std::size_t arena_bytes() const { return executor_->packing().arena_bytes; }
  Tensor logits() const { return executor_->tensor(values_.logits); }
  Tensor gradient(const Parameter& parameter) const {
    const ValueId storage = values_.storages[parameter.storage];
    return weights_.table().view(parameter, executor_->tensor(plan_.gradient(storage)));
  }

 private:
  const ModelWeights& weights_;
  Plan plan_;
  LlamaValues values_;
  HostTensor tokens_, targets_, first_, rope_table_, scalars_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace kiln

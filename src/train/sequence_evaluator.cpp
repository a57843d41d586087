#include "train/sequence_evaluator.h"

#include <algorithm>

#include "ops/rope.h"

namespace kiln {

SequenceEvaluator::SequenceEvaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len)
    : shape_{.sequences = sequences, .seq_len = seq_len},
      tokens_({{shape_.tokens()}, DType::i32}),
      targets_({{shape_.tokens()}, DType::i32}),
      first_({{1}, DType::i32}),
      rope_table_({{seq_len, weights.config().head_dim}, DType::f32}),
      scalars_(scalars_spec()) {
  values_ = record_llama(plan_, weights.config(), DType::f32, shape_, LlamaOutput::losses, seq_len);
  executor_ = std::make_unique<Executor>(plan_, 1);
  fill_rope_table(rope_table_.view(), weights.config().rope_base);
  for (std::size_t s = 0; s < values_.storages.size(); ++s) executor_->bind(values_.storages[s], weights.storage(s));
  executor_->bind(values_.tokens, tokens_.view());
  executor_->bind(values_.targets, targets_.view());
  executor_->bind(values_.first, first_.view());
  executor_->bind(values_.rope_table, rope_table_.view());
  executor_->bind(values_.scalars, scalars_.view());
}

std::vector<SequenceEvaluator::Loss> SequenceEvaluator::run(const Dataset& data, std::int64_t samples) {
  const std::span<std::int32_t> tokens = tokens_.span<std::int32_t>(), targets = targets_.span<std::int32_t>();
  const auto length = static_cast<std::size_t>(shape_.seq_len);
  std::vector<Loss> all(static_cast<std::size_t>(samples));
  for (std::int64_t first = 0; first < samples; first += shape_.sequences) {
    const std::int64_t count = std::min(shape_.sequences, samples - first);  // the rest of a pass repeats old samples
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i) * length;
      data.sample(first + i, tokens.subspan(at, length), targets.subspan(at, length));
    }
    executor_->run(Phase::micro, false);
    const std::span<const float> losses = executor_->tensor(values_.losses).span<float>();
    for (std::int64_t i = 0; i < count; ++i) {
      Loss& loss = all[static_cast<std::size_t>(first + i)];
      for (std::size_t t = static_cast<std::size_t>(i) * length; t < static_cast<std::size_t>(i + 1) * length; ++t) {
        loss.nats += static_cast<double>(losses[t]);
        loss.targets += targets[t] >= 0 ? 1 : 0;
      }
    }
  }
  return all;
}

}  // namespace kiln

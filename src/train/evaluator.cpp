#include "train/evaluator.h"

#include <algorithm>
#include <cmath>

#include "ops/rope.h"

namespace kiln {

double Evaluation::perplexity() const { return std::exp(loss); }

Evaluator::Evaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len)
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

Evaluation Evaluator::run(const Dataset& data, std::int64_t samples, Communicator& communicator) {
  const std::span<std::int32_t> tokens = tokens_.span<std::int32_t>(), targets = targets_.span<std::int32_t>();
  const auto length = static_cast<std::size_t>(shape_.seq_len);
  const std::int64_t begin = samples * communicator.rank() / communicator.size();
  const std::int64_t end = samples * (communicator.rank() + 1) / communicator.size();
  double sum = 0;
  std::int64_t count = 0;
  for (std::int64_t first = begin; first < end; first += shape_.sequences) {
    for (std::int64_t i = 0; i < shape_.sequences; ++i) {
      const auto at = static_cast<std::size_t>(i) * length;
      if (first + i < end) {
        data.sample(first + i, tokens.subspan(at, length), targets.subspan(at, length));
      } else {
        std::fill_n(tokens.begin() + static_cast<std::ptrdiff_t>(at), length, 0);
        std::fill_n(targets.begin() + static_cast<std::ptrdiff_t>(at), length, Dataset::kIgnoredTarget);
      }
    }
    executor_->run(Phase::micro, false);
    for (const float loss : executor_->tensor(values_.losses).span<float>()) sum += static_cast<double>(loss);
    count += std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; });
  }
  sum = communicator.sum(sum);
  const double total = communicator.sum(static_cast<double>(count));
  return {.loss = sum / total, .tokens = static_cast<std::int64_t>(total)};
}

std::int64_t samples_for_tokens(const Dataset& data, std::int64_t tokens) {
  return std::clamp<std::int64_t>(tokens / data.seq_len(), 1, data.samples_per_epoch());
}

}  // namespace kiln

#include "train/sequence_evaluator.h"

#include <algorithm>

namespace kiln {

SequenceEvaluator::SequenceEvaluator(const DeviceWeights& weights, std::int64_t sequences, std::int64_t seq_len)
    : backend_(weights.backend()),
      shape_{.sequences = sequences, .seq_len = seq_len},
      tokens_(static_cast<std::size_t>(shape_.tokens())),
      targets_(tokens_.size()),
      losses_(tokens_.size()),
      inputs_(backend_, weights.config(), weights.layout(), shape_.tokens(), seq_len) {
  values_ = record_llama(plan_, weights.config(), weights.layout(), shape_, LlamaOutput::losses, seq_len);
  executor_ = std::make_unique<Executor>(plan_, 1, backend_);
  weights.bind(*executor_, values_);
  inputs_.bind(*executor_, values_);
}

SequenceEvaluator::SequenceEvaluator(std::unique_ptr<const DeviceWeights> owned, std::int64_t sequences,
                                     std::int64_t seq_len)
    : SequenceEvaluator(*owned, sequences, seq_len) {
  owned_ = std::move(owned);
}

SequenceEvaluator::SequenceEvaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len)
    : SequenceEvaluator(std::make_unique<const DeviceWeights>(weights), sequences, seq_len) {}

std::vector<SequenceEvaluator::Loss> SequenceEvaluator::run(const Dataset& data, std::int64_t samples) {
  const auto length = static_cast<std::size_t>(shape_.seq_len);
  std::vector<Loss> all(static_cast<std::size_t>(samples));
  for (std::int64_t first = 0; first < samples; first += shape_.sequences) {
    const std::int64_t count = std::min(shape_.sequences, samples - first);  // the rest of a pass repeats old samples
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i) * length;
      data.sample(first + i, std::span(tokens_).subspan(at, length), std::span(targets_).subspan(at, length));
    }
    backend_.upload(inputs_.tokens.view(), tokens_.data());
    backend_.upload(inputs_.targets.view(), targets_.data());
    executor_->run(Phase::micro, false);
    backend_.download(losses_.data(), executor_->tensor(values_.losses));
    for (std::int64_t i = 0; i < count; ++i) {
      Loss& loss = all[static_cast<std::size_t>(first + i)];
      for (std::size_t t = static_cast<std::size_t>(i) * length; t < static_cast<std::size_t>(i + 1) * length; ++t) {
        loss.nats += static_cast<double>(losses_[t]);
        loss.targets += targets_[t] >= 0 ? 1 : 0;
      }
    }
  }
  return all;
}

}  // namespace kiln

#include "train/evaluator.h"

#include <algorithm>
#include <cmath>

#include "ops/loss_sum.h"

namespace kiln {

double Evaluation::perplexity() const { return std::exp(loss); }

Evaluator::Evaluator(const DeviceWeights& weights, std::int64_t sequences, std::int64_t seq_len)
    : backend_(weights.backend()),
      shape_{.sequences = sequences, .seq_len = seq_len},
      tokens_(static_cast<std::size_t>(shape_.tokens())),
      targets_(tokens_.size()),
      inputs_(backend_, weights.config(), weights.layout(), shape_.tokens(), seq_len) {
  values_ = record_llama(plan_, weights.config(), weights.layout(), shape_, LlamaOutput::losses, seq_len);
  plan_.add(std::make_shared<LossSum>(), {values_.losses, values_.scalars}, "loss");
  executor_ = std::make_unique<Executor>(plan_, 1, backend_);
  weights.bind(*executor_, values_);
  inputs_.bind(*executor_, values_);
}

Evaluator::Evaluator(std::unique_ptr<const DeviceWeights> owned, std::int64_t sequences, std::int64_t seq_len)
    : Evaluator(*owned, sequences, seq_len) {
  owned_ = std::move(owned);
}

Evaluator::Evaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len)
    : Evaluator(std::make_unique<const DeviceWeights>(weights), sequences, seq_len) {}

/// Samples from `first` on; rows past `end` are masked.
void Evaluator::load(const Dataset& data, std::int64_t first, std::int64_t end) {
  const auto length = static_cast<std::size_t>(shape_.seq_len);
  for (std::int64_t i = 0; i < shape_.sequences; ++i) {
    const auto at = static_cast<std::size_t>(i) * length;
    const std::span<std::int32_t> tokens = std::span(tokens_).subspan(at, length);
    const std::span<std::int32_t> targets = std::span(targets_).subspan(at, length);
    if (first + i < end) {
      data.sample(first + i, tokens, targets);
    } else {
      std::ranges::fill(tokens, 0);
      std::ranges::fill(targets, Dataset::kIgnoredTarget);
    }
  }
  backend_.upload(inputs_.tokens.view(), tokens_.data());
  backend_.upload(inputs_.targets.view(), targets_.data());
}

Evaluation Evaluator::run(const Dataset& data, std::int64_t samples, Communicator& communicator) {
  const std::int64_t begin = samples * communicator.rank() / communicator.size();
  const std::int64_t end = samples * (communicator.rank() + 1) / communicator.size();
  StepScalars scalars{};
  inputs_.set_scalars(backend_, scalars);
  std::int64_t count = 0;
  for (std::int64_t first = begin; first < end; first += shape_.sequences) {
    load(data, first, end);
    executor_->run(Phase::micro, true);  // adds to the zero above
    count += std::ranges::count_if(targets_, [](std::int32_t t) { return t >= 0; });
  }
  backend_.download(scalars.data(), inputs_.scalars.view());
  const double sum = communicator.sum(scalar(scalars, Scalar::loss));
  const double total = communicator.sum(static_cast<double>(count));
  return {.loss = sum / total, .tokens = static_cast<std::int64_t>(total)};
}

std::int64_t samples_for_tokens(const Dataset& data, std::int64_t tokens) {
  return std::clamp<std::int64_t>(tokens / data.seq_len(), 1, data.samples_per_epoch());
}

}  // namespace kiln

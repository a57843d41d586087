#include "train/generator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/rng.h"

namespace kiln {
namespace {

constexpr std::int64_t kPrefillTokens = 128;  // a pass: enough rows to keep the GEMMs busy, scores stay small

std::int64_t checked_positions(std::int64_t positions) {
  check(positions >= 1, "a KV cache of {} positions, expected at least 1", positions);
  return positions;
}

/// exp((logit - max) / temperature): a token's probability up to a common factor.
class Weights {
 public:
  Weights(std::span<const float> logits, float maximum, double temperature)
      : logits_(logits), maximum_(maximum), temperature_(temperature) {}
  double operator()(std::int32_t token) const {
    return std::exp(static_cast<double>(logits_[static_cast<std::size_t>(token)] - maximum_) / temperature_);
  }

 private:
  std::span<const float> logits_;
  float maximum_;
  double temperature_;
};

/// Keeps the likeliest tokens of `kept` that top-k and then top-p leave, likeliest first; equal logits by token.
void restrict_tokens(std::span<const float> logits, const Weights& weight, const SamplingOptions& options,
                     std::vector<std::int32_t>& kept) {
  const auto likelier = [logits](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  const std::size_t limit =
      options.top_k > 0 ? std::min(kept.size(), static_cast<std::size_t>(options.top_k)) : kept.size();
  std::partial_sort(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(limit), kept.end(), likelier);
  kept.resize(limit);
  if (options.top_p >= 1) return;
  double total = 0, mass = 0;
  for (const std::int32_t token : kept) total += weight(token);
  std::size_t count = 0;
  while (count < kept.size() && (count == 0 || mass < options.top_p * total)) mass += weight(kept[count++]);
  kept.resize(count);
}

}  // namespace

void validate(const SamplingOptions& o) {
  check(o.temperature >= 0 && std::isfinite(o.temperature), "temperature: {}, expected at least 0", o.temperature);
  check(o.top_k >= 0, "top_k: {}, expected at least 0 (0 keeps all tokens)", o.top_k);
  check(o.top_p > 0 && o.top_p <= 1, "top_p: {}, expected more than 0 and at most 1", o.top_p);
}

std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, std::uint64_t n,
                          std::vector<std::int32_t>& scratch) {
  validate(options);
  check(!logits.empty(), "no logits to sample from");
  const auto likeliest = std::max_element(logits.begin(), logits.end());
  // A NaN compares false with everything, so the sum shows what the maximum may hide.
  if (!std::isfinite(std::accumulate(logits.begin(), logits.end(), 0.0)))
    fail(ExitCode::data,
         "the model's logits are not finite; its weights are damaged or diverged, use another checkpoint");
  if (options.temperature == 0) return static_cast<std::int32_t>(likeliest - logits.begin());

  const Weights weight(logits, *likeliest, options.temperature);
  scratch.resize(logits.size());
  std::iota(scratch.begin(), scratch.end(), 0);
  if (options.top_k > 0 || options.top_p < 1) restrict_tokens(logits, weight, options, scratch);
  double total = 0, mass = 0;
  for (const std::int32_t token : scratch) total += weight(token);
  const double threshold = Philox(options.seed, stream_of("sampling")).uniform(n) * total;
  for (const std::int32_t token : scratch) {
    mass += weight(token);
    if (mass > threshold) return token;
  }
  return scratch.back();  // rounding left the threshold at the total
}

std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, std::uint64_t n) {
  std::vector<std::int32_t> scratch;
  return sample_token(logits, options, n, scratch);
}

struct Generator::Pass {
  Pass(const DeviceWeights& weights, std::int64_t tokens, std::int64_t positions)
      : count(tokens),
        values(record_llama(plan, weights.config(), weights.layout(), {.sequences = 1, .seq_len = tokens},
                            LlamaOutput::last_logits, positions)),
        executor(plan, 1, weights.backend()) {
    weights.bind(executor, values);
  }

  std::int64_t count;
  Plan plan;
  LlamaValues values;
  Executor executor;
};

Generator::Generator(const DeviceWeights& weights, std::int64_t positions)
    : weights_(weights),
      backend_(weights.backend()),
      positions_(checked_positions(positions)),
      inputs_(backend_, weights.config(), weights.layout(), kPrefillTokens, positions) {
  const LlamaConfig& c = weights.config();
  const TensorSpec cache{{positions, c.kv_heads * c.head_dim}, weights.layout().dtype};
  for (std::int64_t layer = 0; layer < 2 * c.layers; ++layer) cache_.emplace_back(backend_, cache, "KV cache");
  logits_.resize(static_cast<std::size_t>(c.vocab));
  raw_logits_.resize(static_cast<std::size_t>(padded(c, weights.layout()).vocab) * size_of(weights.layout().dtype));
}

Generator::Generator(std::unique_ptr<const DeviceWeights> owned, std::int64_t positions)
    : Generator(*owned, positions) {
  owned_ = std::move(owned);
}

Generator::Generator(const ModelWeights& weights, std::int64_t positions)
    : Generator(std::make_unique<const DeviceWeights>(weights), positions) {}

Generator::~Generator() = default;

Generator::Pass& Generator::pass(std::int64_t tokens) {
  for (const std::unique_ptr<Pass>& made : passes_)
    if (made->count == tokens) return *made;
  passes_.push_back(std::make_unique<Pass>(weights_, tokens, positions_));
  Pass& made = *passes_.back();
  inputs_.bind(made.executor, made.values);
  for (std::size_t layer = 0; layer < made.values.keys.size(); ++layer) {
    made.executor.bind(made.values.keys[layer], cache_[2 * layer].view());
    made.executor.bind(made.values.values[layer], cache_[2 * layer + 1].view());
  }
  return made;
}

/// The logits of the last pass, as f32 on the host.
void Generator::read_logits(const Pass& last) {
  backend_.download(raw_logits_.data(), last.executor.tensor(last.values.logits));
  if (weights_.layout().dtype == DType::bf16) {
    const auto* from = reinterpret_cast<const bfloat16*>(raw_logits_.data());
    std::transform(from, from + logits_.size(), logits_.begin(), [](bfloat16 x) { return to_float(x); });
  } else {
    std::memcpy(logits_.data(), raw_logits_.data(), logits_.size() * sizeof(float));
  }
}

std::span<const float> Generator::feed(std::span<const std::int32_t> tokens) {
  check(!tokens.empty(), "no tokens to feed; a prompt needs at least one");
  const auto count = static_cast<std::int64_t>(tokens.size());
  check(filled_ + count <= positions_, "{} tokens after {} exceed the cache of {} positions; use a longer one", count,
        filled_, positions_);
  const std::int64_t vocab = weights_.config().vocab;
  for (const std::int32_t token : tokens)
    check(token >= 0 && token < vocab, "token {} is outside the model's vocabulary of {}; the tokenizer does not fit",
          token, vocab);
  Pass* last = nullptr;
  while (!tokens.empty()) {
    Pass& next = pass(std::min<std::int64_t>(kPrefillTokens, static_cast<std::int64_t>(tokens.size())));
    const auto size = static_cast<std::size_t>(next.count);
    const auto first = static_cast<std::int32_t>(filled_);
    backend_.upload(inputs_.tokens.view().rows(0, next.count), tokens.data());
    backend_.upload(inputs_.first.view(), &first);
    next.executor.run(Phase::micro, false);
    filled_ += next.count;
    tokens = tokens.subspan(size);
    last = &next;
  }
  read_logits(*last);
  return logits_;
}

std::vector<std::int32_t> Generator::run(const std::vector<std::int32_t>& prompt, std::int64_t count, std::int32_t eos,
                                         const SamplingOptions& options,
                                         const std::function<void(std::int32_t)>& emit) {
  validate(options);
  check(!prompt.empty(), "the prompt is empty; give at least one token");
  check(count >= 0, "{} tokens to generate, expected at least 0", count);
  check(static_cast<std::int64_t>(prompt.size()) + count <= positions_,
        "a prompt of {} tokens and {} new ones exceed the cache of {} positions; shorten one of them", prompt.size(),
        count, positions_);
  reset();
  std::vector<std::int32_t> generated;
  generated.reserve(static_cast<std::size_t>(count));
  std::span<const std::int32_t> next = prompt;
  while (static_cast<std::int64_t>(generated.size()) < count) {
    const std::int32_t token = sample_token(feed(next), options, generated.size(), scratch_);
    if (token == eos) break;
    generated.push_back(token);
    if (emit) emit(token);
    next = std::span(generated).last(1);
  }
  return generated;
}

}  // namespace kiln

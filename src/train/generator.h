#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "graph/executor.h"
#include "model/llama.h"
#include "train/device_memory.h"

namespace kiln {

struct SamplingOptions {
  double temperature = 0.8;  // 0: the likeliest token
  std::int64_t top_k = 0;    // 0: all
  double top_p = 1.0;
  std::uint64_t seed = 1;
};
/// A usage Error for options out of range.
void validate(const SamplingOptions& options);

/// Samples tokens from a model with a KV cache. One sequence; not thread-safe; the weights must outlive it.
class Generator {
 public:
  /// `positions` is the capacity of the cache: prompt and new tokens together.
  Generator(const DeviceWeights& weights, std::int64_t positions);
  /// On the CPU in f32.
  Generator(const ModelWeights& weights, std::int64_t positions);
  ~Generator();

  /// Empties the cache, feeds the prompt, then samples up to `count` tokens or until `eos`, which is not returned;
  /// calls `emit` for each. A usage Error when the prompt is empty, prompt and count exceed the capacity, or a token is
  /// outside the vocabulary; a data Error when the logits are not finite.
  std::vector<std::int32_t> run(const std::vector<std::int32_t>& prompt, std::int64_t count, std::int32_t eos,
                                const SamplingOptions& options, const std::function<void(std::int32_t)>& emit);

  /// Logits [V] after the last of `tokens`, which are appended to the cache; valid until the next call. Runs passes of
  /// up to 128 tokens; the first of each size records a plan and allocates, later ones do not.
  std::span<const float> feed(std::span<const std::int32_t> tokens);
  /// Empties the cache.
  void reset() { filled_ = 0; }

 private:
  struct Pass;  // a plan for a fixed number of new tokens
  Pass& pass(std::int64_t tokens);
  void read_logits(const Pass& last);

  Generator(std::unique_ptr<const DeviceWeights> owned, std::int64_t positions);

  std::unique_ptr<const DeviceWeights> owned_;  // when made from a host model
  const DeviceWeights& weights_;
  Backend& backend_;
  std::int64_t positions_, filled_ = 0;
  ModelInputs inputs_;               // tokens of the largest pass
  std::vector<DeviceTensor> cache_;  // keys and values, layer by layer
  std::vector<std::byte> raw_logits_;
  std::vector<float> logits_;
  std::vector<std::unique_ptr<Pass>> passes_;
  std::vector<std::int32_t> scratch_;  // of sampling
};

/// The index sampled from `logits`, draw number `n` of the options' seed: softmax(logits / temperature) over the top_k
/// likeliest tokens, then over the fewest of them that hold top_p of the mass (Holtzman et al. 2020, arXiv:1904.09751).
/// `scratch` is grown once to the vocabulary and then reused.
std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, std::uint64_t n,
                          std::vector<std::int32_t>& scratch);
std::int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, std::uint64_t n);

}  // namespace kiln

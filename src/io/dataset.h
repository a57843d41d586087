#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/shard.h"

namespace kiln {

/// One source of a mixture: a shell pattern of shards and its weight.
struct DataSource {
  std::string pattern;
  double weight = 1.0;
};

/// A stream of packed samples over token shards.
///
/// A sample is `seq_len` inputs and the `seq_len` targets that follow them by one, cut end to end from a shard;
/// documents are bounded by EOS tokens inside it (packed sequences). Targets may be kIgnoredTarget where the loss must
/// not count. The n-th sample is a pure function of (sources, seq_len, seed, n): a seeded permutation of all samples
/// per epoch, reshuffled each epoch; with several sources, samples are dealt out by a fixed cycle (weights to 1 part in
/// 4096) that keeps every prefix close to the weights. So the position of a run is one integer, whatever the number of
/// ranks, and rank r of R takes samples position + r*k ... of each global batch.
class Dataset {
 public:
  static constexpr std::int32_t kIgnoredTarget = -100;

  /// A data Error for a missing or torn shard, a source with fewer than seq_len + 1 tokens, or (checked once, on
  /// opening) a token >= vocab_size, naming shard, offset and token.
  Dataset(const std::vector<DataSource>& sources, std::int64_t seq_len, std::int64_t vocab_size, std::uint64_t seed);
  ~Dataset();
  Dataset(Dataset&&) noexcept;

  /// Fills inputs and targets (seq_len each) of the n-th sample. Thread-safe, allocates nothing.
  void sample(std::int64_t n, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const;

  std::int64_t seq_len() const;
  /// Tokens over all sources; samples in one epoch over all sources.
  std::int64_t total_tokens() const;
  std::int64_t samples_per_epoch() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The n-th image of a seeded bijection of [0, size): a Feistel network with cycle walking, O(1) memory.
std::int64_t permuted_index(std::int64_t n, std::int64_t size, std::uint64_t seed, std::uint64_t stream);

}  // namespace kiln

#include "io/dataset.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/rng.h"

namespace kiln {
namespace {

/// Where samples of one source lie: sample s is in the last shard whose first_sample <= s.
struct Source {
  std::vector<TokenShard> shards;
  std::vector<std::int64_t> first_sample;
  std::int64_t samples = 0, tokens = 0;
};

void check_tokens(const TokenShard& shard, std::int64_t vocab_size) {
  constexpr std::int64_t kPiece = 1 << 16;
  std::vector<std::int32_t> piece;
  for (std::int64_t first = 0; first < shard.size(); first += kPiece) {
    piece.resize(static_cast<std::size_t>(std::min(kPiece, shard.size() - first)));
    shard.read(first, piece);
    // As unsigned, so that a uint32 token past int32 counts as too large.
    std::uint32_t most = 0;
    for (const std::int32_t token : piece) most = std::max(most, static_cast<std::uint32_t>(token));
    if (most < static_cast<std::uint64_t>(vocab_size)) continue;
    const auto bad = std::find_if(piece.begin(), piece.end(), [&](std::int32_t token) {
      return static_cast<std::uint32_t>(token) >= static_cast<std::uint64_t>(vocab_size);
    });
    fail(ExitCode::data,
         "{}: token {} at offset {}, expected less than the vocabulary of {}; use the tokenizer of the model",
         shard.path().string(), static_cast<std::uint32_t>(*bad), first + (bad - piece.begin()), vocab_size);
  }
}

Source open_source(const DataSource& wanted, std::int64_t seq_len, std::int64_t vocab_size) {
  Source source;
  std::int64_t longest = 0;
  for (const std::filesystem::path& path : expand_glob(wanted.pattern)) {
    TokenShard shard(path);
    check_tokens(shard, vocab_size);
    longest = std::max(longest, shard.size());
    source.tokens += shard.size();
    source.first_sample.push_back(source.samples);
    source.samples += std::max<std::int64_t>(0, (shard.size() - 1) / seq_len);
    source.shards.push_back(std::move(shard));
  }
  if (source.samples == 0)
    fail(ExitCode::data,
         "{}: {} tokens in the longest of its shards ({}), expected at least {} for one sample of seq_len {}; add data "
         "or shorten it",
         wanted.pattern, longest, source.shards.size(), seq_len + 1, seq_len);
  return source;
}

}  // namespace

std::int64_t permuted_index(std::int64_t n, std::int64_t size, std::uint64_t seed, std::uint64_t stream) {
  if (size <= 1) return 0;
  const auto bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(size - 1)));
  const int half = (bits + 1) / 2;  // two halves of equal width cover at most 4 * size
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  const Philox random(seed, stream);
  auto x = static_cast<std::uint64_t>(n);
  do {
    std::uint64_t left = x >> half, right = x & mask;
    for (std::uint64_t round = 0; round < 4; ++round) {
      const std::uint64_t mixed = left ^ (random.bits((round << 60) | right) & mask);
      left = right;
      right = mixed;
    }
    x = (left << half) | right;
  } while (x >= static_cast<std::uint64_t>(size));
  return static_cast<std::int64_t>(x);
}

/// Which source each sample of a mixture comes from: a cycle of kCycle draws, so that any position is looked up.
/// Weights are kept to 1 part in kCycle. Within the cycle every prefix is less than one sample from the weights: of the
/// sources that are not ahead, a draw goes to the one that would first fall a whole sample behind (the chairman
/// assignment of Tijdeman 1980, Discrete Mathematics 32; the source that lags most can leave another 1.4 behind).
class Mixture {
 public:
  struct Draw {
    std::size_t source;
    std::int64_t index;  // how many samples were drawn from it before
  };

  explicit Mixture(std::vector<double> weights) : counts_(weights.size(), 0) {
    const std::size_t sources = weights.size();
    for (std::size_t n = 0; n < kCycle; ++n) {
      std::size_t next = 0;
      double earliest = std::numeric_limits<double>::infinity();
      for (std::size_t s = 0; s < sources; ++s) {
        const auto count = static_cast<double>(counts_[s]);
        const bool ahead = weights[s] * static_cast<double>(n + 1) <= count;
        const double deadline = (count + 1) / weights[s];
        if (!ahead && deadline < earliest) {
          earliest = deadline;
          next = s;
        }
      }
      cycle_.push_back({next, counts_[next]++});
    }
  }

  Draw draw(std::int64_t n) const {
    const Draw& at = cycle_[static_cast<std::size_t>(n) % kCycle];
    return {at.source, n / static_cast<std::int64_t>(kCycle) * counts_[at.source] + at.index};
  }
  std::int64_t per_cycle(std::size_t source) const { return counts_[source]; }

 private:
  static constexpr std::size_t kCycle = 4096;
  std::vector<Draw> cycle_;
  std::vector<std::int64_t> counts_;
};

struct Dataset::Impl {
  std::vector<Source> sources;
  std::int64_t seq_len = 0;
  std::uint64_t seed = 0;
  Mixture mixture;

  void read(const Mixture::Draw& draw, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
    const Source& source = sources[draw.source];
    const auto epoch = static_cast<std::uint64_t>(draw.index / source.samples);
    const std::uint64_t stream = stream_of("data") ^ (static_cast<std::uint64_t>(draw.source) << 40) ^ epoch;
    const std::int64_t sample = permuted_index(draw.index % source.samples, source.samples, seed, stream);
    const auto after = std::upper_bound(source.first_sample.begin(), source.first_sample.end(), sample);
    const auto shard = static_cast<std::size_t>(after - source.first_sample.begin() - 1);
    const std::int64_t begin = (sample - source.first_sample[shard]) * seq_len;
    source.shards[shard].read(begin, inputs);
    source.shards[shard].read(begin + 1, targets);
  }
};

Dataset::Dataset(const std::vector<DataSource>& sources, std::int64_t seq_len, std::int64_t vocab_size,
                 std::uint64_t seed) {
  check(!sources.empty(), "data: no source given; name token shards in data.train");
  check(seq_len >= 1, "data.seq_len: {}, expected at least 1", seq_len);
  double total = 0;
  for (const DataSource& source : sources) {
    check(source.weight > 0 && std::isfinite(source.weight), "{}: weight {}, expected a positive number",
          source.pattern, source.weight);
    total += source.weight;
  }
  std::vector<double> weights;
  for (const DataSource& source : sources) weights.push_back(source.weight / total);
  impl_ = std::make_unique<Impl>(Impl{.sources = {}, .seq_len = seq_len, .seed = seed, .mixture = Mixture(weights)});
  for (std::size_t s = 0; s < sources.size(); ++s) {
    check(impl_->mixture.per_cycle(s) > 0, "{}: weight {} of a total of {} is below one sample in 4096",
          sources[s].pattern, sources[s].weight, total);
    impl_->sources.push_back(open_source(sources[s], seq_len, vocab_size));
  }
}

Dataset::~Dataset() = default;
Dataset::Dataset(Dataset&&) noexcept = default;

void Dataset::sample(std::int64_t n, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
  const auto length = static_cast<std::size_t>(impl_->seq_len);
  check(n >= 0 && inputs.size() == length && targets.size() == length,
        "sample {} asked into {} inputs and {} targets, expected {} of each", n, inputs.size(), targets.size(), length);
  impl_->read(impl_->mixture.draw(n), inputs, targets);
}

std::int64_t Dataset::seq_len() const { return impl_->seq_len; }

std::int64_t Dataset::total_tokens() const {
  std::int64_t total = 0;
  for (const Source& source : impl_->sources) total += source.tokens;
  return total;
}

std::int64_t Dataset::samples_per_epoch() const {
  std::int64_t total = 0;
  for (const Source& source : impl_->sources) total += source.samples;
  return total;
}

}  // namespace kiln

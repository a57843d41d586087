#include "io/dataset.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <numeric>
#include <set>

#include "base/error.h"
#include "catch.h"
#include "corpus_fixture.h"

namespace {
thread_local std::int64_t allocations = 0;
}

// Counts every allocation of this program, so that a test can show that a call makes none. Not inlined: the compiler
// would see a free of what it takes for memory of its own operator new.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace kiln {
namespace {

using test::error_of;
using test::Scratch;
using test::write_shard;

/// Tokens first, first + 1, ...: a token tells where it lay.
std::vector<std::int32_t> counting(std::int32_t first, std::size_t count) {
  std::vector<std::int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

struct Sample {
  std::vector<std::int32_t> inputs, targets;
  bool operator==(const Sample&) const = default;
};

Sample sample_of(const Dataset& data, std::int64_t n) {
  const auto length = static_cast<std::size_t>(data.seq_len());
  Sample sample{std::vector<std::int32_t>(length), std::vector<std::int32_t>(length)};
  data.sample(n, sample.inputs, sample.targets);
  return sample;
}

std::vector<std::int32_t> first_tokens(const Dataset& data, std::int64_t from, std::int64_t count) {
  std::vector<std::int32_t> firsts;
  for (std::int64_t n = from; n < from + count; ++n) firsts.push_back(sample_of(data, n).inputs.front());
  return firsts;
}

/// One shard of 17 samples of length 1 for each source, source s holding tokens 100 s ... 100 s + 17.
std::vector<DataSource> sources_of(const Scratch& scratch, const std::vector<double>& weights) {
  std::vector<DataSource> sources;
  for (std::size_t s = 0; s < weights.size(); ++s) {
    const auto path = scratch / fmt::format("source{}.bin", s);
    write_shard(path, counting(static_cast<std::int32_t>(100 * s), 18), 10'000);
    sources.push_back({path.string(), weights[s]});
  }
  return sources;
}

}  // namespace

TEST_CASE("the permutation is a bijection for every size") {
  for (std::int64_t size = 1; size <= 300; ++size) {
    std::vector<int> hits(static_cast<std::size_t>(size), 0);
    for (std::int64_t n = 0; n < size; ++n) {
      const std::int64_t image = permuted_index(n, size, 7, 3);
      REQUIRE(image >= 0);
      REQUIRE(image < size);
      ++hits[static_cast<std::size_t>(image)];
    }
    REQUIRE(std::all_of(hits.begin(), hits.end(), [](int h) { return h == 1; }));
  }
  std::vector<bool> hit(100'003, false);
  for (std::int64_t n = 0; n < 100'003; ++n) hit[static_cast<std::size_t>(permuted_index(n, 100'003, 1, 0))] = true;
  CHECK(std::count(hit.begin(), hit.end(), false) == 0);
  // Sizes past 32 bits stay in range.
  constexpr std::int64_t kHuge = (std::int64_t{1} << 40) + 12345;
  for (std::int64_t n = 0; n < 1000; ++n) {
    const std::int64_t image = permuted_index(kHuge - 1 - n, kHuge, 1, 0);
    REQUIRE((image >= 0 && image < kHuge));
  }
}

TEST_CASE("the permutation shuffles: displacement, fixed points and neighbours as for a random one") {
  constexpr std::int64_t kSize = 20'000;
  for (const std::uint64_t stream : {0, 1, 2}) {
    double displacement = 0;
    std::int64_t fixed = 0, neighbours = 0, before = -5;
    for (std::int64_t n = 0; n < kSize; ++n) {
      const std::int64_t image = permuted_index(n, kSize, 42, stream);
      displacement += static_cast<double>(std::abs(image - n));
      fixed += image == n;
      neighbours += std::abs(image - before) == 1;
      before = image;
    }
    CHECK(displacement / kSize == Approx(kSize / 3.0).epsilon(0.02));
    CHECK(fixed <= 6);        // expected 1
    CHECK(neighbours <= 12);  // expected 2
  }
  std::int64_t same_stream = 0, same_seed = 0;
  for (std::int64_t n = 0; n < kSize; ++n) {
    same_stream += permuted_index(n, kSize, 42, 0) == permuted_index(n, kSize, 42, 1);
    same_seed += permuted_index(n, kSize, 42, 0) == permuted_index(n, kSize, 43, 0);
  }
  CHECK(same_stream <= 6);
  CHECK(same_seed <= 6);
}

TEST_CASE("samples are cut at multiples of seq_len within a shard, targets follow by one") {
  const Scratch scratch;
  write_shard(scratch / "t_000.bin", counting(0, 41), 1000);     // 4 samples of 10: the last needs token 40
  write_shard(scratch / "t_001.bin", counting(100, 5), 1000);    // none
  write_shard(scratch / "t_002.bin", counting(200, 30), 1000);   // 2: the third lacks its last target
  write_shard(scratch / "t_003.bin", counting(300, 101), 1000);  // 10
  write_shard(scratch / "t_004.bin", {}, 1000);                  // none
  const Dataset data({{(scratch / "t_*.bin").string()}}, 10, 1000, 1);
  CHECK(data.seq_len() == 10);
  CHECK(data.total_tokens() == 41 + 5 + 30 + 101);
  REQUIRE(data.samples_per_epoch() == 16);

  std::set<std::int32_t> firsts;
  for (std::int64_t n = 0; n < 16; ++n) {
    const Sample sample = sample_of(data, n);
    firsts.insert(sample.inputs.front());
    CHECK(sample.inputs == counting(sample.inputs.front(), 10));
    CHECK(sample.targets == counting(sample.inputs.front() + 1, 10));
  }
  CHECK(firsts == std::set<std::int32_t>{0, 10, 20, 30, 200, 210, 300, 310, 320, 330, 340, 350, 360, 370, 380, 390});
}

TEST_CASE("each epoch covers every sample once, in another order; a seed fixes the order") {
  const Scratch scratch;
  write_shard(scratch / "t.bin", counting(0, 1001), 2000);
  const std::vector<DataSource> sources{{(scratch / "t.bin").string()}};
  const Dataset data(sources, 10, 2000, 5), twin(sources, 10, 2000, 5), other(sources, 10, 2000, 6);
  std::vector<std::vector<std::int32_t>> epochs;
  for (std::int64_t epoch = 0; epoch < 4; ++epoch) {
    epochs.push_back(first_tokens(data, 100 * epoch, 100));
    std::vector<std::int32_t> sorted = epochs.back();
    std::sort(sorted.begin(), sorted.end());
    REQUIRE(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end());
    for (std::int64_t before = 0; before < epoch; ++before)
      CHECK(epochs[static_cast<std::size_t>(before)] != epochs.back());
    CHECK(epochs.back() == first_tokens(twin, 100 * epoch, 100));
    CHECK(epochs.back() != first_tokens(other, 100 * epoch, 100));
  }
}

TEST_CASE("the ranks of any split see together what one rank sees") {
  const Scratch scratch;
  const Dataset data(sources_of(scratch, {2, 1}), 1, 10'000, 5);
  constexpr std::int64_t kBatch = 12, kSteps = 5;
  const std::vector<std::int32_t> whole = first_tokens(data, 0, kBatch * kSteps);
  for (const std::int64_t ranks : {2, 3, 4}) {
    std::vector<std::int32_t> split(whole.size());
    for (std::int64_t rank = 0; rank < ranks; ++rank)  // ranks take their turns one after another, backwards
      for (std::int64_t step = kSteps - 1; step >= 0; --step)
        for (std::int64_t k = 0; k < kBatch / ranks; ++k) {
          const std::int64_t n = step * kBatch + rank + ranks * k;
          split[static_cast<std::size_t>(n)] = sample_of(data, n).inputs.front();
        }
    CHECK(split == whole);
  }
}

TEST_CASE("every prefix of a mixture is within one sample of the weights") {
  const Scratch scratch;
  const auto weights =
      GENERATE(std::vector<double>{1, 1}, std::vector<double>{0.7, 0.3}, std::vector<double>{1, 2, 3},
               std::vector<double>{100, 1}, std::vector<double>{0.9, 0.02, 0.02, 0.02, 0.02, 0.02},
               std::vector<double>{30, 20, 10, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1},
               std::vector<double>{13, 50, 13, 50, 5, 50, 13, 2,  3,  8,  2,  13, 2,  5, 3, 3, 8, 13, 8, 8,
                                   13, 8,  50, 8,  5, 2,  50, 50, 50, 50, 50, 2,  13, 1, 8, 2, 5, 2,  5},
               std::vector<double>{13, 7, 7, 5, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const Dataset data(sources_of(scratch, weights), 1, 10'000, 5);
  std::vector<double> drawn(weights.size(), 0);
  double worst = 0, drift = 0;
  for (std::int64_t n = 0; n < 20'000; ++n) {
    ++drawn[static_cast<std::size_t>(sample_of(data, n).inputs.front() / 100)];
    for (std::size_t s = 0; s < weights.size(); ++s) {
      const double apart = std::abs(drawn[s] - weights[s] / total * static_cast<double>(n + 1));
      if (n < 4096) worst = std::max(worst, apart);
      drift = std::max(drift, apart - static_cast<double>(n + 1) / 4096);  // weights hold to 1 part in 4096
    }
  }
  CHECK(worst < 1.0 + 1e-9);
  CHECK(drift < 1.0 + 1e-9);
}

TEST_CASE("each source of a mixture runs through its own epochs") {
  const Scratch scratch;
  const Dataset data(sources_of(scratch, {3, 1}), 1, 10'000, 5);
  std::map<int, std::vector<std::int32_t>> seen;
  for (std::int64_t n = 0; n < 17 * 4096; n += 1) {
    const std::int32_t first = sample_of(data, n).inputs.front();
    seen[first / 100].push_back(first % 100);
  }
  for (const auto& [source, tokens] : seen)
    for (std::size_t epoch = 0; epoch + 17 <= tokens.size(); epoch += 17) {
      const std::set<std::int32_t> once(tokens.begin() + static_cast<std::ptrdiff_t>(epoch),
                                        tokens.begin() + static_cast<std::ptrdiff_t>(epoch + 17));
      REQUIRE(once.size() == 17);
    }
  CHECK(seen[0].size() == 17 * 3072);
}

TEST_CASE("sample allocates nothing and checks its arguments") {
  const Scratch scratch;
  const Dataset data(sources_of(scratch, {2, 1}), 4, 10'000, 5);
  std::vector<std::int32_t> inputs(4), targets(4);
  const std::int64_t before = allocations;
  for (std::int64_t n = 0; n < 5000; ++n) data.sample(n * 977, inputs, targets);
  CHECK(allocations == before);

  std::vector<std::int32_t> shorter(3);
  CHECK(error_of([&] { data.sample(0, shorter, targets); }).code() == ExitCode::usage);
  CHECK(error_of([&] { data.sample(0, inputs, shorter); }).code() == ExitCode::usage);
  CHECK(error_of([&] { data.sample(-1, inputs, targets); }).code() == ExitCode::usage);
}

TEST_CASE("a token outside the vocabulary is found on opening, with its shard and offset") {
  const Scratch scratch;
  auto tokens = counting(0, 1000);
  tokens.insert(tokens.end(), 200'000, 999);
  write_shard(scratch / "v_000.bin", tokens, 1000);
  tokens[150'001] = 1000;
  tokens[150'003] = 4000;
  write_shard(scratch / "v_001.bin", tokens, 5000);
  const std::vector<DataSource> sources{{(scratch / "v_*.bin").string()}};
  CHECK(Dataset(sources, 8, 4001, 1).samples_per_epoch() > 0);
  const Error error = error_of([&] { Dataset data(sources, 8, 1000, 1); });
  CHECK(error.code() == ExitCode::data);
  CHECK_THAT(error.what(), ContainsSubstring("v_001.bin: token 1000 at offset 150001") && ContainsSubstring("1000"));

  // The very last token counts too, and so does a wide one that is negative as int32.
  write_shard(scratch / "w.bin", {1, 2, 3, 70'000}, 100'000);
  std::fstream file(scratch / "w.bin", std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(1024 + 12);
  file.write("\xff\xff\xff\xff", 4);
  file.close();
  const Error wide = error_of([&] { Dataset data({{(scratch / "w.bin").string()}}, 2, 100'000, 1); });
  CHECK(wide.code() == ExitCode::data);
  CHECK_THAT(wide.what(), ContainsSubstring("token 4294967295 at offset 3"));
}

TEST_CASE("a source that is too short, torn or missing is named") {
  const Scratch scratch;
  write_shard(scratch / "s_000.bin", counting(0, 8), 1000);
  const auto open = [&](const std::string& pattern) {
    return error_of([&] { Dataset data({{(scratch / pattern).string()}}, 8, 1000, 1); });
  };

  const Error small = open("s_*.bin");
  CHECK(small.code() == ExitCode::data);
  CHECK_THAT(small.what(),
             ContainsSubstring("s_*.bin: 8 tokens in the longest of its shards (1), expected at least 9"));

  // Many short shards hold enough tokens together but no sample.
  write_shard(scratch / "s_001.bin", counting(0, 7), 1000);
  const Error many = open("s_*.bin");
  CHECK(many.code() == ExitCode::data);
  CHECK_THAT(many.what(), ContainsSubstring("8 tokens in the longest of its shards (2), expected at least 9"));

  write_shard(scratch / "s_002.bin", counting(0, 9), 1000);
  CHECK(open("s_*.bin").code() == ExitCode::ok);
  std::filesystem::resize_file(scratch / "s_002.bin", 1024 + 17);
  const Error torn = open("s_*.bin");
  CHECK(torn.code() == ExitCode::data);
  CHECK_THAT(torn.what(), ContainsSubstring("s_002.bin: 1041 bytes, expected 1042"));

  for (const std::string pattern : {"absent.bin", "absent*.bin"}) {
    const Error missing = open(pattern);
    CHECK(missing.code() == ExitCode::data);
    CHECK_THAT(missing.what(), ContainsSubstring(pattern));
  }
}

TEST_CASE("a mixture without sense is a usage error") {
  const Scratch scratch;
  const auto code = [&](const std::vector<double>& weights) {
    const auto sources = sources_of(scratch, weights);
    return error_of([&] { Dataset data(sources, 1, 10'000, 1); }).code();
  };
  CHECK(code({}) == ExitCode::usage);
  CHECK(code({1, 0}) == ExitCode::usage);
  CHECK(code({1, -1}) == ExitCode::usage);
  CHECK(code({1, NAN}) == ExitCode::usage);
  CHECK(code({1, INFINITY}) == ExitCode::usage);
  CHECK(code({1, 1e-6}) == ExitCode::usage);  // never drawn
  CHECK(code({1, 1e-3}) == ExitCode::ok);
  const auto one = sources_of(scratch, {1});
  CHECK(error_of([&] { Dataset data(one, 0, 10'000, 1); }).code() == ExitCode::usage);
}

}  // namespace kiln

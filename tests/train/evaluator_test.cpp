#include "train/evaluator.h"

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <numeric>

#include "base/rng.h"
#include "catch.h"
#include "io/shard.h"
#include "ops/rope.h"

using namespace kiln;

namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kVocab = 61, kSeqLen = 12;

struct TempDir {
  TempDir() {
    static std::atomic<int> next{0};
    path = fs::temp_directory_path() / fmt::format("kiln_evaluator_{}_{}", ::getpid(), next++);
    fs::create_directories(path);
  }
  ~TempDir() { fs::remove_all(path); }
  fs::path path;
};

ModelWeights small_weights() {
  LlamaConfig config;
  config.vocab = kVocab;
  config.hidden = 16;
  config.ffn = 24;
  config.heads = config.kv_heads = 2;
  config.layers = 1;
  config.head_dim = 8;
  config.init_std = 0.3;
  ModelWeights weights(config, DType::f32);
  initialise(weights, 5);
  return weights;
}

Dataset small_data(const fs::path& directory, std::int64_t tokens) {
  TokenShardWriter shard(directory / "valid.bin", kVocab);
  const Philox random(9, 0);
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < tokens; ++i)
    ids.push_back(static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(i)) % kVocab));
  shard.append(ids);
  shard.finish();
  return Dataset({{(directory / "valid.bin").string(), 1.0}}, kSeqLen, kVocab, 1);
}

/// Negative log-likelihood of every target of the n-th sample, from whole logits and in double precision.
std::vector<double> sample_losses(const ModelWeights& weights, const Dataset& data, std::int64_t n) {
  Plan plan;
  const LlamaValues values = record_llama(plan, weights.config(), DType::f32, {.sequences = 1, .seq_len = kSeqLen},
                                          LlamaOutput::logits, kSeqLen);
  Executor executor(plan, 1);
  HostTensor inputs({{kSeqLen}, DType::i32}), targets({{kSeqLen}, DType::i32}), first({{1}, DType::i32});
  HostTensor table({{kSeqLen, weights.config().head_dim}, DType::f32});
  fill_rope_table(table.view(), weights.config().rope_base);
  data.sample(n, inputs.span<std::int32_t>(), targets.span<std::int32_t>());
  for (std::size_t s = 0; s < values.storages.size(); ++s) executor.bind(values.storages[s], weights.storage(s));
  executor.bind(values.tokens, inputs.view());
  executor.bind(values.first, first.view());
  executor.bind(values.rope_table, table.view());
  executor.run(Phase::micro, false);
  std::vector<double> losses;
  for (std::int64_t t = 0; t < kSeqLen; ++t) {
    const auto row = executor.tensor(values.logits).rows(t, 1).span<float>();
    double sum = 0;
    for (const float logit : row) sum += std::exp(static_cast<double>(logit));
    const auto target = static_cast<std::size_t>(targets.span<std::int32_t>()[static_cast<std::size_t>(t)]);
    losses.push_back(std::log(sum) - static_cast<double>(row[target]));
  }
  return losses;
}

double plain_average(const ModelWeights& weights, const Dataset& data, std::int64_t samples) {
  double sum = 0;
  for (std::int64_t n = 0; n < samples; ++n)
    for (const double loss : sample_losses(weights, data, n)) sum += loss;
  return sum / static_cast<double>(samples * kSeqLen);
}

/// Rank `rank` of `size`, alone: sums are its own part.
class OneOfMany final : public Communicator {
 public:
  OneOfMany(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void all_reduce_sum(const Tensor&, const Tensor&) override {}
  std::size_t scratch_bytes(const TensorSpec&) const override { return 0; }
  double sum(double value) override { return value; }
  double maximum(double value) override { return value; }
  void broadcast(std::span<std::byte>) override {}
  void barrier() override {}
  [[noreturn]] void abort(int code) override { std::_Exit(code); }

 private:
  int rank_, size_;
};

}  // namespace

TEST_CASE("The mean is exact whatever the size of a pass", "[evaluator]") {
  const TempDir temp;
  const ModelWeights weights = small_weights();
  const Dataset data = small_data(temp.path, 12 * kSeqLen + 1);
  const auto communicator = make_local_communicator();
  for (const std::int64_t samples : {1, 5, 7, 12}) {
    const double expected = plain_average(weights, data, samples);
    for (const std::int64_t sequences : {1, 3, 4, 16}) {
      CAPTURE(samples, sequences);
      Evaluator evaluator(weights, sequences, kSeqLen);
      const Evaluation found = evaluator.run(data, samples, *communicator);
      CHECK(found.tokens == samples * kSeqLen);
      CHECK(found.loss == Approx(expected).epsilon(1e-6));
      CHECK(found.perplexity() == Approx(std::exp(expected)).epsilon(1e-5));
    }
  }
}

TEST_CASE("A pass that is masked leaves nothing for the next run", "[evaluator]") {
  const TempDir temp;
  const ModelWeights weights = small_weights();
  const Dataset data = small_data(temp.path, 12 * kSeqLen + 1);
  const auto communicator = make_local_communicator();
  Evaluator evaluator(weights, 4, kSeqLen);
  const double whole = evaluator.run(data, 8, *communicator).loss;
  evaluator.run(data, 1, *communicator);  // three of four sequences masked
  CHECK(evaluator.run(data, 8, *communicator).loss == whole);
}

TEST_CASE("Ranks share samples out without gap or overlap", "[evaluator]") {
  const TempDir temp;
  const ModelWeights weights = small_weights();
  const Dataset data = small_data(temp.path, 12 * kSeqLen + 1);
  Evaluator evaluator(weights, 2, kSeqLen);
  for (const int ranks : {2, 3, 5}) {
    double sum = 0;
    std::int64_t tokens = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      OneOfMany communicator(rank, ranks);
      const Evaluation part = evaluator.run(data, 7, communicator);
      sum += part.loss * static_cast<double>(part.tokens);
      tokens += part.tokens;
    }
    CHECK(tokens == 7 * kSeqLen);
    CHECK(sum / static_cast<double>(tokens) == Approx(plain_average(weights, data, 7)).epsilon(1e-6));
  }
}

TEST_CASE("Tokens asked for become whole samples within one epoch", "[evaluator]") {
  const TempDir temp;
  const Dataset data = small_data(temp.path, 12 * kSeqLen + 1);
  CHECK(samples_for_tokens(data, 1) == 1);
  CHECK(samples_for_tokens(data, 3 * kSeqLen) == 3);
  CHECK(samples_for_tokens(data, 1'000'000) == 12);
}

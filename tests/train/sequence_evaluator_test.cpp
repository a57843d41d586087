#include "train/sequence_evaluator.h"

#include <filesystem>

#include "base/rng.h"
#include "catch.h"
#include "io/shard.h"
#include "train/evaluator.h"

using namespace kiln;

TEST_CASE("losses by sequence sum to the evaluator's mean, for any size of a pass, and follow the weights") {
  namespace fs = std::filesystem;
  std::string pattern = (fs::temp_directory_path() / "kiln-sequences-XXXXXX").string();
  const fs::path dir = ::mkdtemp(pattern.data());
  {
    TokenShardWriter shard(dir / "valid.bin", 61);
    const Philox random(9, 0);
    std::vector<std::int32_t> ids;
    for (std::uint64_t i = 0; i < 300; ++i) ids.push_back(static_cast<std::int32_t>(random.bits(i) % 61));
    shard.append(ids);
    shard.finish();
  }
  LlamaConfig config;
  config.vocab = 61;
  config.hidden = 16;
  config.ffn = 24;
  config.heads = config.kv_heads = 2;
  config.layers = 1;
  config.head_dim = 8;
  config.init_std = 0.3;
  const ModelWeights weights(config, DType::f32);
  initialise(weights, 5);
  const Dataset data({{(dir / "valid.bin").string(), 1.0}}, 12, 61, 1);
  const auto communicator = make_local_communicator();

  SequenceEvaluator one(weights, 1, 12), four(weights, 4, 12);
  const std::vector<SequenceEvaluator::Loss> losses = four.run(data, 10), alone = one.run(data, 10);
  REQUIRE(losses.size() == 10);
  double nats = 0;
  std::int64_t targets = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    CHECK(losses[i].nats == Approx(alone[i].nats).epsilon(1e-6));
    nats += losses[i].nats;
    targets += losses[i].targets;
  }
  CHECK(losses[0].nats != Approx(losses[1].nats).epsilon(1e-3));
  Evaluator mean(weights, 4, 12);
  CHECK(targets == 120);
  CHECK(nats / static_cast<double>(targets) == Approx(mean.run(data, 10, *communicator).loss).epsilon(1e-9));

  initialise(weights, 6);
  CHECK(four.run(data, 10)[0].nats != Approx(losses[0].nats).epsilon(1e-4));
  fs::remove_all(dir);
}

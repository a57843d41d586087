// Losses by sequence on the GPU, against the CPU's.
#include "train/sequence_evaluator.h"

#include <cmath>

#include "base/rng.h"
#include "catch.h"
#include "io/corpus_fixture.h"
#include "model_run.h"

namespace kiln::test {
namespace {

TEST_CASE("losses by sequence on the GPU are those of the CPU to bf16, and follow the weights", "[gpu]") {
  const Scratch scratch;
  const Philox random(3, 3);
  std::vector<std::int32_t> text;
  for (std::uint64_t i = 0; i < 4000; ++i) text.push_back(static_cast<std::int32_t>(random.bits(i) % 1000));
  write_shard(scratch / "valid.bin", text, 1000);
  const LlamaConfig model = small_model(false);
  const ModelWeights weights(model, DType::f32);
  initialise(weights, 5);
  const Dataset data({{.pattern = (scratch / "valid.bin").string()}}, 64, 1000, 1);
  const auto gpu = open_device(Device::cuda);
  const DeviceWeights on_gpu(weights, storage_layout(*gpu), false, *gpu);
  SequenceEvaluator cpu(weights, 4, 64), device(on_gpu, 4, 64);
  double before = 0;
  for (const std::uint64_t seed : {5, 6}) {
    initialise(weights, seed);
    on_gpu.push();
    const auto expected = cpu.run(data, 10), found = device.run(data, 10);  // the last pass is not full
    REQUIRE(found.size() == 10);
    for (std::size_t i = 0; i < found.size(); ++i) {
      CHECK(found[i].targets == expected[i].targets);
      CHECK(std::abs(found[i].nats / expected[i].nats - 1) < 0.01);
    }
    CHECK(found[0].nats != before);
    before = found[0].nats;
  }
}

}  // namespace
}  // namespace kiln::test

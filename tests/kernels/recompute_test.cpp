// Recomputation and memory planning on the GPU.
#include <filesystem>

#include "base/rng.h"
#include "catch.h"
#include "io/corpus_fixture.h"
#include "train/device.h"
#include "train/trainer.h"

namespace kiln::test {
namespace {

Config make_config(const Scratch& scratch) {
  if (!std::filesystem::exists(scratch / "train.bin")) {
    const Philox random(3, 3);
    std::vector<std::int32_t> text;
    for (std::uint64_t i = 0; i < 40000; ++i)
      text.push_back(static_cast<std::int32_t>((i * 5 + random.bits(i) % 3) % 4000));
    write_shard(scratch / "train.bin", text, 4000);
  }
  return parse_config(fmt::format("run: {{dir: {0}/run, seed: 3, device: cuda}}\n"
                                  "model: {{preset: llama_9m, vocab: 4000}}\n"
                                  "data: {{train: {0}/train.bin, valid: {0}/train.bin, seq_len: 128}}\n"
                                  "batch: {{sequences: 24, micro: 12}}\n"
                                  "schedule: {{kind: constant, peak_lr: 0.003, total_steps: 12}}\n"
                                  "optimizer: {{kind: adamw}}\n",
                                  scratch.path().string()),
                      "test.yaml", {});
}

TEST_CASE("recomputation on the GPU changes no bit of loss and gradient norm", "[gpu]") {
  const Scratch scratch;
  const auto communicator = make_local_communicator();
  Config config = make_config(scratch);
  auto steps = [&](Recompute recompute, std::optional<std::int64_t> layers = {}) {
    config.memory.recompute = recompute;
    config.memory.recompute_layers = layers;
    Trainer trainer(config, *communicator, {.quiet = true, .write_files = false});
    std::vector<double> seen;
    for (int i = 0; i < 4; ++i) {
      const StepMetrics step = trainer.step();
      seen.push_back(step.loss);
      seen.push_back(step.grad_norm);
    }
    return seen;
  };
  const std::vector<double> none = steps(Recompute::none);
  CHECK(steps(Recompute::norms) == none);
  CHECK(steps(Recompute::block) == none);
  CHECK(steps(Recompute::block, 1) == none);
}

TEST_CASE("the plan's bytes are within 3 % of what the device allocated", "[gpu]") {
  const Scratch scratch;
  const auto communicator = make_local_communicator();
  const auto planning = open_planning_device(Device::cuda);
  Config config = make_config(scratch);
  for (const Recompute recompute : kRecomputes) {
    INFO(to_string(recompute));
    config.memory.recompute = recompute;
    const MemoryChoice choice = configured_memory(config, 1, *planning);
    const auto expected = static_cast<double>(packed_memory(config, choice, *planning, *communicator).total());
    Trainer trainer(config, *communicator, {.quiet = true, .write_files = false});
    trainer.step();
    trainer.evaluate();
    CHECK(static_cast<double>(trainer.memory_bytes()) == Approx(expected).epsilon(0.03));
  }
}

TEST_CASE("a budget on the GPU is kept by recomputing", "[gpu]") {
  const Scratch scratch;
  const auto communicator = make_local_communicator();
  const auto planning = open_planning_device(Device::cuda);
  Config config = make_config(scratch);
  const MemoryChoice block{.micro = {.sequences = 12, .seq_len = 128}, .recompute = Recompute::block};
  config.memory.budget = packed_memory(config, block, *planning, *communicator).total();
  const MemoryChoice chosen = choose_memory(config, *planning, *communicator);
  CHECK(chosen.recompute.policy == block.recompute.policy);
  CHECK(chosen.micro.sequences == block.micro.sequences);
  config.memory.budget = 1000;
  CHECK_THROWS_WITH(Trainer(config, *communicator, {.quiet = true, .write_files = false}),
                    ContainsSubstring("memory.budget: 1000 bytes"));
}

}  // namespace
}  // namespace kiln::test

#include "train/micro_timing.h"

#include "base/json.h"
#include "catch.h"
#include "io/corpus_fixture.h"
#include "train/device.h"
#include "train/small_config.h"
#include "train/trainer.h"

namespace kiln::test {
namespace {

/// Times 8 sequences best, unless `flat`; counts its calls.
struct FakeTimer {
  int calls = 0;
  bool flat = false, fails = false;
  StepTimer timer() {
    return [this](const MemoryChoice& choice) {
      ++calls;
      if (fails) fail(ExitCode::resource, "out of memory");
      const auto micro = static_cast<double>(choice.micro.sequences);
      return flat ? 1.0 - 1e-4 / micro : 1.0 + std::abs(micro - 8) / 200;
    };
  }
};

constexpr std::uint64_t kPlenty = std::uint64_t{1} << 40;
const MemoryChoice kSixteen{.micro = {.sequences = 16, .seq_len = 32}};

std::int64_t timed(const Config& config, FakeTimer& fake, const MicroTimingFiles& files,
                   std::uint64_t budget = kPlenty) {
  const auto communicator = make_local_communicator();
  return time_micro_batches(config, kSixteen, budget, cpu_backend(), *communicator, files, fake.timer())
      .micro.sequences;
}

TEST_CASE("the micro-batch with the shortest step is taken, kept with the run, and on the machine") {
  const Scratch scratch;
  const MicroTimingFiles files{.run = scratch / "run/micro_batch.json", .cache = scratch / "cache/micro.json"};
  FakeTimer fake;
  CHECK(timed(small_config(), fake, files) == 8);
  CHECK(fake.calls == 5);  // 64, 32, 16, 8, 4
  CHECK(timed(small_config(), fake, files) == 8);
  CHECK(timed(small_config(), fake, {.run = {}, .cache = files.cache}) == 8);
  CHECK(timed(small_config(), fake, {.run = files.run, .cache = {}}) == 8);
  CHECK(fake.calls == 5);
  // Another optimizer steps as long; another model does not.
  CHECK(timed(small_config("optimizer: {kind: fira, rank: 8}\n"), fake, {.run = {}, .cache = files.cache}) == 8);
  CHECK(fake.calls == 5);
  CHECK(timed(small_config("precision: {gradients: fp32}\n"), fake, {.run = {}, .cache = files.cache}) == 8);
  CHECK(fake.calls == 10);
  CHECK(read_json(files.cache).at("entries").size() == 2);
}

TEST_CASE("of micro-batches that are as fast the larger is taken, and what does not fit is not timed") {
  FakeTimer fake{.flat = true};
  CHECK(timed(small_config(), fake, {}) == 64);
  CHECK(fake.calls == 5);
  const auto communicator = make_local_communicator();
  const Config config = small_config();
  const std::uint64_t sixteen = packed_memory(config, kSixteen, cpu_backend(), *communicator).total();
  fake.calls = 0;
  CHECK(timed(config, fake, {}, sixteen) == 16);
  CHECK(fake.calls == 3);  // 16, 8, 4
}

TEST_CASE("what a run started with stands, whatever the machine has found since") {
  const Scratch scratch;
  const MicroTimingFiles files{.run = scratch / "micro_batch.json", .cache = scratch / "micro.json"};
  write_file(files.run, "{\"micro\": 32}");
  FakeTimer fake;
  CHECK(timed(small_config(), fake, files) == 32);
  CHECK(fake.calls == 0);
  write_file(files.run, "{\"micro\": 7}");  // no divisor
  CHECK(timed(small_config(), fake, files) == 8);
  CHECK(read_json(files.run).at("micro") == 8);
}

TEST_CASE("damaged files, a directory that cannot be written and a failure to time end no run") {
  const Scratch scratch;
  const MicroTimingFiles files{.run = scratch / "micro_batch.json", .cache = scratch / "micro.json"};
  for (const char* text : {"", "[1]", "{\"micro\": \"x\", \"entries\": [3, {\"of\": 1}]}", "{\"entries\": 5}"}) {
    write_file(files.run, text);
    write_file(files.cache, text);
    FakeTimer fake;
    CHECK(timed(small_config(), fake, files) == 8);
    CHECK(fake.calls == 5);
  }
  FakeTimer fake;
  CHECK(timed(small_config(), fake, {.run = "/dev/null/a/b.json", .cache = "/dev/null/a/c.json"}) == 8);
  fake.fails = true;
  CHECK(timed(small_config(), fake, {}) == 16);
}

TEST_CASE("gradients in bf16 take a whole share as one micro-batch, and only on a GPU and one rank") {
  const Config config = small_config("precision: {gradients: bf16}\n");
  CHECK(micro_batches_of(config, 1) == std::vector<std::int64_t>{64});
  CHECK(micro_batch(config, 1).sequences == 64);
  CHECK_THROWS_WITH(plan_options(config, configured_memory(config, 1, cpu_backend()), cpu_backend(), 1),
                    ContainsSubstring("precision.gradients: bf16 on the CPU"));
#ifdef KILN_WITH_CUDA
  const auto gpu = open_planning_device(Device::cuda);
  const auto communicator = make_local_communicator();
  const MemoryChoice whole = configured_memory(config, 1, *gpu);
  CHECK(plan_options(config, whole, *gpu, 1).layout.linear_gradients == DType::bf16);
  CHECK_THROWS_WITH(plan_options(config, whole, *gpu, 2), ContainsSubstring("2 ranks"));
  const Config split = small_config("precision: {gradients: bf16}\n");
  CHECK_THROWS_WITH(packed_memory(split, kSixteen, *gpu, *communicator), ContainsSubstring("4 micro-batches"));
  const Config automatic = small_config();
  CHECK(plan_options(automatic, kSixteen, *gpu, 1).layout.linear_gradients == DType::f32);
  CHECK(plan_options(automatic, {.micro = {.sequences = 64, .seq_len = 32}}, *gpu, 1).layout.linear_gradients ==
        DType::bf16);
#endif
}

}  // namespace
}  // namespace kiln::test

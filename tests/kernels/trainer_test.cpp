// The trainer on the GPU: what it saves is where it goes on from.
#include "train/trainer.h"

#include "base/files.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "kernels/run_config.h"

namespace kiln::test {
namespace {

namespace fs = std::filesystem;

Config make_config(const Scratch& scratch, const std::string& weights) {
  return run_config(scratch, weights,
                    "schedule: {kind: cosine, peak_lr: 0.003, warmup_steps: 3, total_steps: 12}\n"
                    "checkpoint: {every: 5, keep: 2}\n"
                    "eval: {every: 6, tokens: 640}\n");
}

/// Every weight and optimizer state, byte for byte.
std::vector<std::byte> bytes_of(const Trainer& trainer) {
  std::vector<std::byte> all;
  auto append = [&](const Tensor& t) {
    const auto* data = static_cast<const std::byte*>(t.data);
    all.insert(all.end(), data, data + t.bytes());
  };
  const ModelWeights& weights = trainer.weights();
  for (const Parameter& parameter : weights.table().parameters) append(weights.view(parameter));
  trainer.states().visit([&](const std::string&, const Tensor& t) { append(t); });
  return all;
}

std::string last_line(const std::string& text) {
  const std::size_t end = text.find_last_not_of('\n');
  const std::size_t begin = text.rfind('\n', end);
  return text.substr(begin == std::string::npos ? 0 : begin + 1, end - begin);
}

/// A run that never stops beside one that is saved at step 7 and goes on in another trainer.
void check_resume(const Config& config, const Scratch& scratch) {
  const auto communicator = make_local_communicator();
  Trainer whole(config, *communicator, {.quiet = true, .write_files = false});
  const TrainSummary summary = whole.run();
  REQUIRE(summary.valid_loss.has_value());
  CHECK(*summary.valid_loss < 6.8);  // log(1000) is 6.9

  Config split = config;
  split.run.dir = (scratch / "split").string();
  {
    Trainer part(split, *communicator, {.quiet = true});
    for (int i = 0; i < 7; ++i) part.step();
    save_checkpoint(fs::path(split.run.dir) / checkpoint_name(7),
                    {.weights = part.weights(), .states = part.states(), .config = to_json(split), .tokenizer = {}},
                    part.at());
  }
  Trainer resumed(split, *communicator, {.quiet = true});
  REQUIRE(resumed.resume_latest());
  CHECK(resumed.at().step == 7);
  const TrainSummary end = resumed.run();
  CHECK(bytes_of(resumed) == bytes_of(whole));
  // The last step is collected too: logged, and evaluated whatever the cadence.
  const Json last = Json::parse(last_line(read_text(fs::path(split.run.dir) / "metrics.jsonl")));
  CHECK(last.at("step") == end.at.step);
  CHECK(last.at("valid_loss") == *end.valid_loss);
  CHECK(end.at.step == config.schedule.total_steps);

  Trainer other(config, *communicator, {.quiet = true, .write_files = false});
  other.step();
  CHECK(bytes_of(other) != bytes_of(whole));
}

TEST_CASE("save and resume on the GPU is bitwise the same as never stopping", "[gpu]") {
  for (const std::string weights : {"fp32", "bf16_sr"}) {
    INFO(weights);
    const Scratch scratch;
    check_resume(make_config(scratch, weights), scratch);
  }
}

TEST_CASE("every member on the GPU resumes bitwise, over a refresh, in every precision of states and gradients",
          "[gpu]") {
  struct Case {
    OptimizerKind kind;
    StatePrecision states, basis = StatePrecision::fp32;
    ProjectorKind projector = ProjectorKind::power;
  };
  for (const Case& c : {Case{OptimizerKind::adamw, StatePrecision::bf16},
                        {OptimizerKind::adam8bit, StatePrecision::int8},
                        {OptimizerKind::galore, StatePrecision::fp32},
                        {OptimizerKind::fira, StatePrecision::bf16},
                        {OptimizerKind::fira_plus, StatePrecision::fp32},
                        {OptimizerKind::fira_plus, StatePrecision::bf16},
                        {OptimizerKind::galore, StatePrecision::int8, StatePrecision::bf16},
                        {OptimizerKind::fira, StatePrecision::int8, StatePrecision::int8},
                        {OptimizerKind::fira_plus, StatePrecision::int8, StatePrecision::int8},
                        {OptimizerKind::fira_plus, StatePrecision::fp32, StatePrecision::bf16},
                        {OptimizerKind::galore, StatePrecision::fp32, StatePrecision::fp32, ProjectorKind::svd},
                        {OptimizerKind::fira_plus, StatePrecision::bf16, StatePrecision::int8, ProjectorKind::svd},
                        {OptimizerKind::apollo, StatePrecision::fp32},
                        {OptimizerKind::apollo, StatePrecision::int8},
                        {OptimizerKind::apollo_mini, StatePrecision::fp32},
                        {OptimizerKind::apollo_mini, StatePrecision::bf16},
                        {OptimizerKind::apollo_mini, StatePrecision::int8},
                        {OptimizerKind::muon, StatePrecision::fp32},
                        {OptimizerKind::muon, StatePrecision::bf16},
                        {OptimizerKind::muon, StatePrecision::int8},
                        {OptimizerKind::lora, StatePrecision::fp32},
                        {OptimizerKind::lora, StatePrecision::int8},
                        {OptimizerKind::relora, StatePrecision::bf16},
                        {OptimizerKind::relora, StatePrecision::int8}})
    for (const std::int64_t micro : {3, 12}) {  // gradients in f32 and in bf16
      INFO(to_string(c.kind) << ", states " << to_string(c.states) << ", basis " << to_string(c.basis)
                             << (c.projector == ProjectorKind::svd ? ", svd" : "") << ", micro-batch " << micro);
      const Scratch scratch;
      Config config = make_config(scratch, "fp32");
      config.model.ffn = 256;  // 8-bit states take no padding
      config.model.vocab = 1024;
      config.batch.micro = micro;
      config.optimizer.kind = c.kind;
      config.optimizer.states = c.states;
      config.optimizer.projector_states = c.basis;
      config.optimizer.projector = c.projector;
      config.optimizer.rank = 16;
      config.optimizer.refresh = 3;
      check_supported(config);
      check_resume(config, scratch);
    }
}

TEST_CASE("a run of Fira goes from the CPU to the GPU and back with the same states, bit for bit", "[gpu]") {
  struct Case {
    StatePrecision states, basis;
  };
  for (const Case& c :
       {Case{StatePrecision::int8, StatePrecision::int8}, {StatePrecision::bf16, StatePrecision::bf16}}) {
    INFO("states " << to_string(c.states) << ", basis " << to_string(c.basis));
    const Scratch scratch;
    Config on_cpu = make_config(scratch, "fp32");
    on_cpu.optimizer.kind = OptimizerKind::fira;
    on_cpu.optimizer.states = c.states;
    on_cpu.optimizer.projector_states = c.basis;
    on_cpu.optimizer.rank = 16;
    on_cpu.optimizer.refresh = 3;
    on_cpu.run.device = Device::cpu;
    Config on_gpu = on_cpu;
    on_gpu.run.device = Device::cuda;
    const auto communicator = make_local_communicator();
    const TrainerOptions quiet{.quiet = true, .write_files = false};
    const auto save = [&](const Trainer& trainer, const Config& config) {
      save_checkpoint(
          fs::path(config.run.dir) / checkpoint_name(trainer.at().step),
          {.weights = trainer.weights(), .states = trainer.states(), .config = to_json(config), .tokenizer = {}},
          trainer.at());
    };

    Trainer first(on_cpu, *communicator, quiet);
    for (int i = 0; i < 4; ++i) first.step();
    save(first, on_cpu);
    Trainer second(on_gpu, *communicator, quiet);
    REQUIRE(second.resume_latest());
    CHECK(second.at().step == 4);
    const std::vector<std::byte> moved = bytes_of(second);
    CHECK(moved == bytes_of(first));
    const double expected = first.step().loss;  // what the CPU goes on with, the GPU does in bf16
    CHECK(second.step().loss == Approx(expected).epsilon(1e-2));
    for (int i = 0; i < 3; ++i) second.step();  // over a refresh
    CHECK(bytes_of(second) != moved);
    save(second, on_gpu);

    Trainer third(on_cpu, *communicator, quiet);
    REQUIRE(third.resume_latest());
    CHECK(third.at().step == 8);
    CHECK(bytes_of(third) == bytes_of(second));
    const double last = second.step().loss;
    CHECK(third.step().loss == Approx(last).epsilon(1e-2));
  }
}

}  // namespace
}  // namespace kiln::test

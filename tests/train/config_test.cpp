#include "train/config.h"

#include "base/files.h"
#include "catch.h"
#include "train/trainer.h"

namespace kiln {
namespace {

Config parse(const std::string& text, std::vector<std::string> overrides = {}) {
  return parse_config(text, "a.yaml", overrides);
}

/// The error of a configuration; "no error" when it is accepted.
std::string error(const std::string& text, std::vector<std::string> overrides = {}) {
  try {
    parse(text, std::move(overrides));
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::usage);
    return e.what();
  }
  return "no error";
}

TEST_CASE("a mistake is answered with its place and the nearest key") {
  CHECK_THAT(error("optimizer:\n  knd: fira\n"),
             ContainsSubstring("a.yaml:2:3: optimizer.knd is not a known key; did you mean 'optimizer.kind'?"));
  CHECK_THAT(error("optimiser: {kind: fira}\n"),
             ContainsSubstring("a.yaml:1:1: optimiser is not a known key; did you mean 'optimizer'?"));
  CHECK_THAT(error("optimizer:\n  kind: firra\n"),
             ContainsSubstring("a.yaml:2:9: optimizer.kind 'firra' is not known; did you mean 'fira'?"));
  CHECK_THAT(error("batch:\n  sequences: lots\n"),
             ContainsSubstring("a.yaml:2:14: batch.sequences is 'lots', expected a whole number"));
  CHECK_THAT(error("batch: {sequences: 2, sequences: 3}\n"), ContainsSubstring("batch.sequences is set twice"));
  CHECK_THAT(error("batch: [1]\n"), ContainsSubstring("batch is a list, expected a map"));
  CHECK_THAT(error("a: b: c\n"), ContainsSubstring("a.yaml:1:"));
  CHECK_THAT(error("memory: {budget: 3 cows}\n"), ContainsSubstring("is not a size"));
  CHECK_THAT(error("data: {train: [{path: x, wieght: 2}]}\n"), ContainsSubstring("key 'wieght' is not known"));
}

TEST_CASE("values that do not fit together are refused") {
  CHECK_THAT(error("schedule: {warmup_steps: 20, total_steps: 10}\n"), ContainsSubstring("schedule.warmup_steps: 20"));
  CHECK_THAT(error("schedule: {kind: wsd, warmup_steps: 5, total_steps: 10, decay_steps: 6}\n"),
             ContainsSubstring("schedule.decay_steps: 6"));
  CHECK_THAT(error("model: {preset: llama_60m, heads: 7}\n"), ContainsSubstring("multiple of model.heads 7"));
  CHECK_THAT(error("model: {preset: llama_61m}\n"), ContainsSubstring("llama_60m"));
  CHECK_THAT(error("optimizer: {kind: fira, rank: 0}\n"), ContainsSubstring("optimizer.rank: 0"));
  CHECK_THAT(error("optimizer: {beta2: 1}\n"), ContainsSubstring("optimizer.beta2: 1"));
  CHECK_THAT(error("parallel: {zero: 2}\n"), ContainsSubstring("parallel.zero: 2"));
  CHECK_THAT(error("memory: {recompute: block, recompute_layers: 0}\n"),
             ContainsSubstring("memory.recompute_layers: 0"));
  for (const char* recompute : {"auto", "none"})
    CHECK_THAT(error(fmt::format("memory: {{recompute: {}, recompute_layers: 2}}\n", recompute)),
               ContainsSubstring(fmt::format("memory.recompute_layers: 2, but memory.recompute is {}", recompute)));
  CHECK(parse("memory: {recompute: norms, recompute_layers: 2}\n").memory.recompute_layers == 2);
}

TEST_CASE("overrides come last, in order, and name themselves in errors") {
  const Config config = parse("batch: {sequences: 4}\n",
                              {"batch.sequences=8", "data.train=[a, {path: b, weight: 2}]", "batch.micro=auto"});
  CHECK(config.batch.sequences == 8);
  CHECK_FALSE(config.batch.micro.has_value());
  REQUIRE(config.data.train.size() == 2);
  CHECK(config.data.train[1].pattern == "b");
  CHECK(config.data.train[1].weight == 2);
  CHECK_THAT(error("", {"batch.sequence=8"}),
             ContainsSubstring("override batch.sequence=8: batch.sequence is not a known key"));
  CHECK_THAT(error("", {"nonsense"}), ContainsSubstring("write section.key=value"));
}

TEST_CASE("what is written reads back as the same configuration") {
  const Config config = parse(
      "run: {dir: 'runs/a: b', seed: 7}\nmodel: {preset: llama_60m, tied: true}\n"
      "data: {train: [{path: 'x*', weight: 0.5}], seq_len: 128}\nmemory: {budget: 24GiB}\n"
      "optimizer: {kind: galore, alpha: 0.1, projector: svd}\nsnapshots: {every: 5, dtype: bf16}\n");
  CHECK(to_json(parse(to_yaml(config))) == to_json(config));
  CHECK(config.memory.budget == std::uint64_t{24} << 30);
  CHECK(config.run.name == "a: b");
}

TEST_CASE("a preset gives the sizes and keys override it") {
  const Config config = parse("model: {preset: llama_60m, kv_heads: 2, vocab: 100}\n");
  const LlamaConfig model = model_config(config);
  CHECK(model.hidden == 512);
  CHECK(model.kv_heads == 2);
  CHECK(model.vocab == 100);
  CHECK(optimizer_options(parse("optimizer: {kind: fira}\n")).eps == 1e-6);
  CHECK(optimizer_options(parse("optimizer: {kind: adamw}\n")).eps == 1e-8);
}

TEST_CASE("a member has its own defaults, and takes over from another only what means the same") {
  auto options = [](const std::string& optimizer) {
    return optimizer_options(parse("optimizer: {" + optimizer + "}\n"));
  };
  CHECK(options("kind: fira").alpha == 0.25);
  CHECK(options("kind: apollo").alpha == 1);
  CHECK(options("kind: apollo_mini").alpha == 128);
  CHECK(options("kind: lora").alpha == 32);
  CHECK(options("kind: lora, alpha: 16").alpha == 16);
  CHECK(options("kind: apollo").eps == 1e-6);
  CHECK(options("kind: adam8bit").states == StatePrecision::int8);
  CHECK(options("kind: fira").stagger);
  CHECK_FALSE(options("kind: fira, projector: svd").stagger);
  CHECK(options("kind: fira, projector: svd, stagger: true").stagger);
  CHECK_THAT(error("optimizer: {kind: adam8bit, states: bf16}\n"), ContainsSubstring("adam8bit has int8 states"));

  const Config fira = parse("optimizer: {kind: fira, alpha: 0.1, states: bf16, eps: 1.0e-7}\n");
  CHECK(optimizer_options(with_optimizer(fira, OptimizerKind::galore)).alpha == 0.1);
  CHECK(optimizer_options(with_optimizer(fira, OptimizerKind::apollo_mini)).alpha == 128);
  CHECK(optimizer_options(with_optimizer(fira, OptimizerKind::apollo_mini)).states == StatePrecision::bf16);
  CHECK(optimizer_options(with_optimizer(fira, OptimizerKind::adam8bit)).states == StatePrecision::int8);
  CHECK(optimizer_options(with_optimizer(fira, OptimizerKind::muon)).eps == 1e-7);
}

const std::string kWhole = "run: {dir: r}\nmodel: {preset: llama_9m}\ndata: {train: x}\n";
const std::vector<Device> kDevices{Device::cpu, Device::cuda};  // that auto may stand for

std::string_view name_of(Device device) { return device == Device::cuda ? "with a GPU" : "without a GPU"; }

TEST_CASE("settings of the contract that this version lacks are refused by name") {
  for (const Device automatic : kDevices) {
    INFO(name_of(automatic));
    check_supported(parse(kWhole), automatic);
    CHECK_THROWS_WITH(check_supported(parse(kWhole, {"parallel.zero=1"}), automatic),
                      ContainsSubstring("parallel.zero: 1 is not available in this version"));
  }
  CHECK_THROWS_WITH(check_supported(parse("model: {preset: llama_9m}\ndata: {train: x}\n")),
                    ContainsSubstring("run.dir is missing"));
  CHECK_THROWS_WITH(check_supported(parse("run: {dir: r}\nmodel: {preset: llama_9m}\n")),
                    ContainsSubstring("data.train is missing"));
}

TEST_CASE("weights in bf16 are refused on the CPU alone") {
  const auto refused = [](Device automatic, std::vector<std::string> overrides) {
    overrides.emplace_back("precision.weights=bf16_sr");
    CHECK_THROWS_WITH(check_supported(parse(kWhole, overrides), automatic),
                      ContainsSubstring("precision.weights: bf16_sr on the CPU is not available in this version"));
  };
  refused(Device::cpu, {});
  for (const Device automatic : kDevices) refused(automatic, {"run.device=cpu"});
  check_supported(parse(kWhole, {"precision.weights=bf16_sr"}), Device::cuda);
  // Where there is no GPU, opening it says so.
  check_supported(parse(kWhole, {"precision.weights=bf16_sr", "run.device=cuda"}), Device::cpu);
}

TEST_CASE("every precision of bases and every projector is supported with and without a GPU") {
  for (const Device automatic : kDevices)
    for (const char* kind : {"galore", "fira", "fira+"})
      for (const char* basis : {"fp32", "bf16", "int8"})
        for (const char* projector : {"power", "svd"}) {
          INFO(kind << ", bases of " << basis << ", " << projector << ", " << name_of(automatic));
          CHECK_NOTHROW(check_supported(parse(kWhole, {fmt::format("optimizer.kind={}", kind),
                                                       fmt::format("optimizer.projector_states={}", basis),
                                                       fmt::format("optimizer.projector={}", projector)}),
                                        automatic));
        }
}

TEST_CASE("every configuration that ships loads with and without a GPU, and the help names every key") {
  const std::vector<std::filesystem::path> paths = expand_glob(KILN_SOURCE_DIR "/configs/*.yaml");
  CHECK(paths.size() >= 10);
  for (const std::filesystem::path& path : paths)
    for (const Device automatic : kDevices) {
      INFO(path.string() << ", " << name_of(automatic));
      CHECK_NOTHROW(check_supported(load_config(path, {}), automatic));
    }
  CHECK_THAT(config_help(), ContainsSubstring("optimizer.refresh") && ContainsSubstring("eval.tokens"));
}

}  // namespace
}  // namespace kiln

#include "train/memory_report.h"

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <map>

#include "catch.h"
#include "graph/packing.h"
#include "io/shard.h"
#include "train/device.h"

using namespace kiln;

namespace {

namespace fs = std::filesystem;

struct TempDir {
  TempDir() {
    static std::atomic<int> next{0};
    path = fs::temp_directory_path() / fmt::format("kiln_memory_{}_{}", ::getpid(), next++);
    fs::create_directories(path);
  }
  ~TempDir() { fs::remove_all(path); }
  fs::path path;
};

/// GQA, so that k and v are wide (m < n as stored) and down_proj is, while gate and up are tall.
Config small_config() {
  Config config;
  config.run.name = "small";
  config.model.hidden = 48;
  config.model.ffn = 80;
  config.model.heads = 4;
  config.model.kv_heads = 2;
  config.model.layers = 2;
  config.model.vocab = 100;
  config.data.seq_len = 32;
  config.batch.sequences = 12;
  config.batch.micro = 2;
  config.optimizer.rank = 8;
  config.run.dir = "unused";
  return config;
}

Config with_kind(const Config& config, OptimizerKind kind) { return with_optimizer(config, kind); }

const OptimizerMemory& of_kind(const MemoryReport& report, OptimizerKind kind) {
  for (const OptimizerMemory& memory : report.optimizers)
    if (memory.kind == kind) return memory;
  FAIL("no such optimizer in the report");
  return report.optimizers.front();
}

TrainPlanOptions options_of(const Config& config) {
  const BatchShape micro = micro_batch(config, 1);
  return {.model = model_config(config),
          .optimizer = optimizer_options(config),
          .micro = micro,
          .micro_batches = static_cast<int>(config.batch.sequences / micro.sequences)};
}

/// Bytes of arena activations that are written up to the classifier and read after it, or left by it.
std::uint64_t activations_kept_for_backward(const Plan& plan) {
  std::size_t classifier = 0;
  for (std::size_t n = 0; n < plan.nodes().size(); ++n)
    if (plan.nodes()[n].op->name() == "classifier_with_gradient") classifier = n;
  REQUIRE(classifier > 0);
  std::vector<bool> written(plan.values().size()), read(plan.values().size());
  for (std::size_t n = 0; n < plan.nodes().size(); ++n)
    for (const ValueId id : n <= classifier ? plan.nodes()[n].out : plan.nodes()[n].in)
      (n <= classifier ? written : read)[static_cast<std::size_t>(id.index)] = true;
  std::uint64_t bytes = 0;
  for (std::size_t v = 0; v < plan.values().size(); ++v) {
    const Value& value = plan.values()[v];
    if (!value.external && value.role == Role::activation && written[v] && (read[v] || value.kept))
      bytes += value.spec.bytes();
  }
  return bytes;
}

TEST_CASE("padding that would turn the side of a low-rank matrix is refused") {
  const auto communicator = make_local_communicator();
  const auto options = [](const std::string& ffn, const std::string& optimizer) {
    const std::vector<std::string> overrides{"model.ffn=" + ffn, "optimizer.kind=" + optimizer};
    const Config config = parse_config("model: {hidden: 64, heads: 2, layers: 1, vocab: 64}\n", "test.yaml", overrides);
    return TrainPlanOptions{.model = model_config(config),
                            .optimizer = optimizer_options(config),
                            .micro = {.sequences = 1, .seq_len = 8},
                            .layout = {DType::bf16, 64}};
  };
  CHECK_THROWS_WITH(record_train_plan(options("40", "fira"), *communicator),
                    ContainsSubstring("whose subspace is another"));
  record_train_plan(options("100", "fira"), *communicator);
  record_train_plan(options("40", "adamw"), *communicator);
}

}  // namespace

TEST_CASE("The formulas of optimizer states are those of the papers", "[memory_report]") {
  const Parameter tall{.name = "w", .shape = {80, 48}, .decay = true, .low_rank = true};
  const Parameter wide{.name = "w", .shape = {48, 80}, .decay = true, .low_rank = true};
  const Parameter embedding{.name = "e", .shape = {100, 48}, .decay = true, .low_rank = false};
  const OptimizerOptions adamw{.kind = OptimizerKind::adamw, .rank = 8},
      galore{.kind = OptimizerKind::galore, .rank = 8}, fira{.kind = OptimizerKind::fira, .rank = 8};
  for (const Parameter& parameter : {tall, wide}) {
    CHECK(state_bytes(parameter, adamw) == 4 * (2 * 48 * 80));
    CHECK(state_bytes(parameter, galore) == 4 * (48 * 8 + 2 * 80 * 8));
    CHECK(state_bytes(parameter, fira) == 4 * (48 * 8 + 2 * 80 * 8 + 1));
    CHECK(state_bytes(parameter, {.kind = OptimizerKind::apollo, .rank = 8}) == 4 * (2 * 80 * 8 + 1));
    CHECK(state_bytes(parameter, {.kind = OptimizerKind::apollo_mini, .rank = 8}) == 4 * (2 * 80 + 1));
    CHECK(state_bytes(parameter, {.kind = OptimizerKind::muon, .states = StatePrecision::bf16}) == 2 * 48 * 80);
    CHECK(state_bytes(parameter, {.kind = OptimizerKind::lora, .rank = 8}) == 4 * 3 * (48 + 80) * 8);
    // 80 * 8 numbers are two and a half blocks of 256.
    CHECK(state_bytes(parameter, {.kind = OptimizerKind::fira, .rank = 8, .states = StatePrecision::int8}) ==
          4 * 48 * 8 + 2 * (80 * 8 + 4 * 3) + 4);
  }
  CHECK(state_bytes(tall, {.kind = OptimizerKind::galore, .rank = 1000}) == 4 * (48 * 48 + 2 * 80 * 48));  // r = m
  for (const OptimizerOptions& options : {adamw, galore, fira})
    CHECK(state_bytes(embedding, options) == 4 * 2 * 100 * 48);
  CHECK(state_bytes(embedding, {.kind = OptimizerKind::fira_plus}) == 2 * (100 * 48 + 4 * 19));
  CHECK(state_bytes({.name = "n", .shape = {48}}, {.states = StatePrecision::int8}) == 4 * 2 * 48);
}

TEST_CASE("Formula and counted bytes agree to the byte", "[memory_report]") {
  const auto communicator = make_local_communicator();
  for (const OptimizerKind kind : optimizer_kinds()) {
    for (const std::int64_t rank : {1, 8, 24, 200})
      for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8}) {
        if (kind == OptimizerKind::adam8bit && states != StatePrecision::int8) continue;
        CAPTURE(to_string(kind), rank, to_string(states));
        Config config = with_kind(small_config(), kind);
        config.optimizer.rank = rank;
        config.optimizer.states = states;
        config.optimizer.projector_states = states;
        const TrainPlanOptions options = options_of(config);
        const TrainPlan plan = record_train_plan(options, *communicator);
        const MemoryFormula formula = memory_formula(plan, options);
        CHECK(formula.states == plan.state_bytes());
        CHECK(formula.states == OptimizerStates(plan.table, *plan.optimizer).bytes());
        CHECK(formula.weights == plan.parameter_bytes());
        CHECK(formula.activations == activations_kept_for_backward(plan.plan));
        const PackedMemory packed = packed_memory(config, *communicator);
        CHECK(packed.states == formula.states);
        CHECK(packed.weights == formula.weights);
      }
  }
}

TEST_CASE("Formula and counted states agree for every preset", "[memory_report]") {
  const auto communicator = make_local_communicator();
  for (const std::string_view preset : llama_preset_names()) {
    Config config;
    config.model.preset = preset;
    for (const OptimizerKind kind : optimizer_kinds()) {
      CAPTURE(preset, to_string(kind));
      const TrainPlanOptions options = options_of(with_kind(config, kind));
      const TrainPlan plan = record_train_plan(options, *communicator);
      const MemoryFormula formula = memory_formula(plan, options);
      CHECK(formula.states == plan.state_bytes());
      CHECK(formula.weights == plan.parameter_bytes());
      CHECK(formula.activations == activations_kept_for_backward(plan.plan));
    }
  }
}

TEST_CASE("The activations of the formula are those that each way to recompute leaves", "[memory_report]") {
  const auto communicator = make_local_communicator();
  std::vector<Recomputation> ways(std::begin(kRecomputes), std::end(kRecomputes));
  ways.insert(ways.end(), {{Recompute::norms, 3}, {Recompute::block, 1}});
  for (const std::string_view preset : {"llama_9m", "llama_350m"})
    for (const Recomputation& recompute : ways) {
      CAPTURE(preset, to_string(recompute));
      Config config;
      config.model.preset = preset;
      TrainPlanOptions options = options_of(config);
      options.recompute = recompute;
      const TrainPlan plan = record_train_plan(options, *communicator);
      CHECK(memory_formula(plan, options).activations == activations_kept_for_backward(plan.plan));
    }
}

TEST_CASE("auto takes the first choice within the budget, and says what is missing", "[memory_report]") {
  const auto communicator = make_local_communicator();
  Backend& cpu = cpu_backend();
  Config config = small_config();
  auto bytes = [&](std::int64_t micro, Recomputation recompute) {
    const MemoryChoice choice{.micro = {.sequences = micro, .seq_len = config.data.seq_len}, .recompute = recompute};
    return packed_memory(config, choice, cpu, *communicator).total();
  };
  auto chosen = [&](std::uint64_t budget) {
    config.memory.budget = budget;
    const MemoryChoice choice = choose_memory(config, cpu, *communicator);
    CHECK(packed_memory(config, choice, cpu, *communicator).total() <= budget);
    return std::pair(choice.micro.sequences, choice.recompute);
  };
  using Choice = std::pair<std::int64_t, Recomputation>;
  config.batch.sequences = 48;
  config.model.layers = 6;
  config.batch.micro = 16;
  CHECK(bytes(16, Recompute::norms) < bytes(16, Recompute::none));
  CHECK(bytes(16, Recompute::block) < bytes(16, Recompute::norms));
  CHECK(choose_memory(config, cpu, *communicator).recompute == Recompute::none);  // no budget
  CHECK(chosen(bytes(16, Recompute::none)) == Choice(16, Recompute::none));
  for (const Recompute policy : {Recompute::norms, Recompute::block})
    for (const std::int64_t layers : {1, 3, 4}) {
      CAPTURE(to_string(policy), layers);
      CHECK(bytes(16, {policy, layers}) < bytes(16, {policy, layers - 1}));
      CHECK(chosen(bytes(16, {policy, layers})) == Choice(16, {policy, layers}));
    }
  CHECK(chosen(bytes(16, Recompute::block)).second.policy == Recompute::block);
  CHECK_THROWS_WITH(chosen(bytes(16, Recompute::block) - 1),
                    ContainsSubstring(std::to_string(bytes(16, Recompute::block))) &&
                        ContainsSubstring(std::to_string(bytes(16, Recompute::block) - 1)) &&
                        ContainsSubstring("memory.budget"));
  try {
    chosen(1);
    FAIL("a byte was enough");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::resource);
  }

  config.batch.micro.reset();  // 48 sequences of 32 tokens are one micro-batch, unless memory asks for less
  CHECK(chosen(bytes(48, Recompute::none)) == Choice(48, Recompute::none));
  CHECK(chosen(bytes(48, Recompute::none) - 1) == Choice(24, Recompute::none));
  const std::uint64_t least = bytes(6, Recompute::none) - 1;  // an eighth of 48 and less is worth recomputing for
  CHECK(chosen(least).second.policy != Recompute::none);
  CHECK(chosen(least).first >= 6);
  config.memory.recompute = Recompute::none;
  CHECK(chosen(least).second == Recompute::none);
  CHECK(chosen(least).first < 6);
}

TEST_CASE("Training under a budget takes what fits and learns the same", "[memory_report]") {
  const TempDir temp;
  std::vector<std::int32_t> tokens(1000);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i * i % 97);
  TokenShardWriter shard(temp.path / "data.bin", 100);
  shard.append(tokens);
  shard.finish();
  const auto communicator = make_local_communicator();
  Config config = small_config();
  config.data.train = {{(temp.path / "data.bin").string(), 1.0}};
  config.run.dir = (temp.path / "run").string();
  config.batch.micro = 6;
  const MemoryChoice block{.micro = {.sequences = 6, .seq_len = config.data.seq_len}, .recompute = Recompute::block};
  const std::uint64_t budget = packed_memory(config, block, cpu_backend(), *communicator).total();
  const TrainerOptions options{.quiet = true, .write_files = false};
  Trainer free(config, *communicator, options);
  config.memory.budget = budget;
  Trainer tight(config, *communicator, options);
  CHECK(tight.memory_bytes() == budget);
  CHECK(tight.memory_bytes() < free.memory_bytes());
  for (int step = 0; step < 3; ++step) {
    const StepMetrics a = free.step(), b = tight.step();
    CHECK(a.loss == b.loss);
    CHECK(a.grad_norm == b.grad_norm);
  }
}

#ifdef KILN_WITH_CUDA
TEST_CASE("A plan for a GPU needs none", "[memory_report]") {
  const auto communicator = make_local_communicator();
  const auto gpu = open_planning_device(Device::cuda);
  if (gpu->is_host()) return;
  Config config;
  config.model.preset = "llama_60m";
  config.batch.sequences = 512;
  config.run.dir = "unused";
  const MemoryChoice choice = configured_memory(config, 1, *gpu);
  CHECK(choice.micro.sequences == 512);  // 131,072 tokens at C 512
  /// Pairs that the GPU takes in one kernel.
  auto pairs = [&](Recompute recompute) {
    const TrainPlan train = record_train_plan(plan_options(config, {choice.micro, recompute}, *gpu, 1), *communicator);
    std::map<std::string, int> count;
    for (const NodeGroup group : pack(train.plan, 1, *gpu).groups)
      if (group.count == 2)
        ++count[fmt::format("{}+{}", train.plan.nodes()[group.first].op->name(),
                            train.plan.nodes()[group.first + 1].op->name())];
    return count;
  };
  const auto none = pairs(Recompute::none), norms = pairs(Recompute::norms);
  auto block = pairs(Recompute::block);
  CHECK(none.at("linear+rope") == 8);
  CHECK(norms == none);
  for (const char* again : {"linear+rope", "linear+swiglu"}) {
    CHECK(block.at(again) == 2 * none.at(again));
    block.at(again) -= none.at(again);
  }
  // Within a layer the sum and its norm are made again; the one between layers is what block keeps.
  CHECK(none.at("linear+add_rms_norm") == 16);
  CHECK(block.at("linear+add_rms_norm") == 24);
  block.at("linear+add_rms_norm") -= 8;
  CHECK(block == none);
  const PackedMemory packed = packed_memory(config, choice, *gpu, *communicator);
  const LlamaConfig stored = padded(llama_preset("llama_60m"), storage_layout(*gpu));
  CHECK(packed.weights == 4 * static_cast<std::uint64_t>(stored.parameter_count()));  // two halves of two bytes
  CHECK(packed.states == 2 * packed.weights);
  CHECK(packed.inputs > gpu->staging_bytes());
  const MemoryReport report = memory_report(config, *communicator, *gpu);
  REQUIRE(report.optimizers.size() + report.refused.size() == optimizer_kinds().size());
  for (const MemoryReport::Refused& refused : report.refused) {
    INFO(to_string(refused.kind) << ": " << refused.reason);
    CHECK((refused.reason.find("cuda: ") == 0 || refused.reason.find("8-bit states") != std::string::npos));
  }
  // 8-bit states have the blocks of the unpadded weights: ffn 1376 is then stored as it is, not as 1408.
  Config coded = config;
  coded.optimizer.kind = OptimizerKind::adam8bit;
  CHECK(plan_options(config, choice, *gpu, 1).layout.multiple == 64);
  CHECK(plan_options(coded, choice, *gpu, 1).layout.multiple == 8);
  coded.model.ffn = 1408;
  CHECK(plan_options(coded, choice, *gpu, 1).layout.multiple == 64);
  config.optimizer.rank = 100;  // kernels take eights
  const MemoryReport odd = memory_report(config, *communicator, *gpu);
  for (const OptimizerMemory& memory : odd.optimizers) CHECK_FALSE(has_rank(memory.kind));
  CHECK(report.optimizers.front().kind == OptimizerKind::adamw);
}

TEST_CASE("A plan says without a GPU whether its kernels wait for the device", "[memory_report]") {
  const auto communicator = make_local_communicator();
  const auto gpu = open_planning_device(Device::cuda);
  Config config;
  config.model.preset = "llama_60m";
  config.run.dir = "unused";
  config.optimizer.clip_norm = 0;  // as updates in backward want it
  const auto plan = [&](OptimizerKind kind, ProjectorKind projector) {
    config.optimizer.kind = kind;
    config.optimizer.projector = projector;
    return record_train_plan(plan_options(config, configured_memory(config, 1, *gpu), *gpu, 1), *communicator);
  };
  for (const OptimizerKind kind : {OptimizerKind::galore, OptimizerKind::fira, OptimizerKind::fira_plus})
    for (const UpdatePlacement placement : {UpdatePlacement::after_backward, UpdatePlacement::in_backward}) {
      INFO(to_string(kind) << ", placement " << static_cast<int>(placement));
      config.memory.update = placement;
      const TrainPlan exact = plan(kind, ProjectorKind::svd), power = plan(kind, ProjectorKind::power);
      check_kernels(exact.plan, *gpu);
      CHECK(gpu->blocks_host(exact.plan));
      CHECK_FALSE(gpu->blocks_host(power.plan));
      CHECK_FALSE(cpu_backend().blocks_host(exact.plan));
    }
  config.memory.update = UpdatePlacement::after_backward;
  CHECK_FALSE(gpu->blocks_host(plan(OptimizerKind::adamw, ProjectorKind::svd).plan));
  CHECK_FALSE(gpu->blocks_host(plan(OptimizerKind::apollo, ProjectorKind::svd).plan));
  // The Gram matrix of the shortest side's largest, its eigenvectors in place and the solver's own, all in f64.
  const auto workspace = [&](OptimizerKind kind, ProjectorKind projector) {
    const TrainPlan train = plan(kind, projector);
    std::size_t bytes = 0;
    const Packing packing = pack(train.plan, 1, *gpu);
    for (const NodeGroup group : packing.groups)
      if (train.plan.nodes()[group.first].op->name().ends_with("_update"))
        bytes = std::max(bytes, packing.workspace_bytes[group.first]);
    return bytes;
  };
  const std::size_t short_side = 512, least = 3 * short_side * short_side * sizeof(double);
  const std::size_t galore = workspace(OptimizerKind::galore, ProjectorKind::svd);
  CHECK(galore > least);
  CHECK(workspace(OptimizerKind::fira, ProjectorKind::svd) == galore);
  CHECK(workspace(OptimizerKind::fira_plus, ProjectorKind::svd) > galore);  // and what turns the moments
}

TEST_CASE("What ships for one GPU packs within it", "[memory_report]") {
  const auto communicator = make_local_communicator();
  const auto gpu = open_planning_device(Device::cuda);
  struct Card {
    const char* name;
    std::uint64_t gib;  // of the card, less about 1 for the driver, the libraries and the graph; of 80 GiB 4
  };
  for (const Card& card : {Card{"llama_7b_20gib", 19}, Card{"llama_10b_24gib", 23}, Card{"llama_38b_80gib", 76}}) {
    Config config = load_config(fmt::format("{}/configs/{}.yaml", KILN_SOURCE_DIR, card.name), {});
    const MemoryChoice choice = configured_memory(config, 1, *gpu);
    const PackedMemory packed = packed_memory(config, choice, *gpu, *communicator);
    INFO(card.name << ": " << packed.total() << " bytes");
    CHECK(choice.recompute == Recompute::block);
    CHECK(packed.total() <= card.gib << 30);
    CHECK(packed.weights >= 2 * static_cast<std::uint64_t>(model_config(config).parameter_count()));
    // What the file says is what makes it fit.
    config.precision.weights = WeightPrecision::fp32;
    CHECK(packed_memory(config, choice, *gpu, *communicator).total() > card.gib << 30);
  }
}
#endif

TEST_CASE("Tied weights are counted once", "[memory_report]") {
  const auto communicator = make_local_communicator();
  Config config = with_kind(small_config(), OptimizerKind::fira);
  const std::uint64_t untied = packed_memory(config, *communicator).weights;
  config.model.tied = true;
  const TrainPlanOptions options = options_of(config);
  const TrainPlan plan = record_train_plan(options, *communicator);
  CHECK(memory_formula(plan, options).weights == plan.parameter_bytes());
  CHECK(untied - plan.parameter_bytes() == 4 * 100 * 48);
  CHECK(memory_formula(plan, options).activations == activations_kept_for_backward(plan.plan));
}

TEST_CASE("The report is what the trainer allocates", "[memory_report]") {
  const TempDir temp;
  std::vector<std::int32_t> tokens(1000, 7);
  TokenShardWriter shard(temp.path / "data.bin", 100);
  shard.append(tokens);
  shard.finish();
  const auto communicator = make_local_communicator();
  Config config = small_config();
  config.data.train = {{(temp.path / "data.bin").string(), 1.0}};
  config.run.dir = (temp.path / "run").string();
  for (const bool validated : {false, true}) {
    if (validated) config.data.valid = config.data.train;
    for (const OptimizerKind kind : optimizer_kinds()) {
      CAPTURE(to_string(kind), validated);
      const Config one = with_kind(config, kind);
      const PackedMemory packed = packed_memory(one, *communicator);
      CHECK(packed.total() == Trainer(one, *communicator, {.quiet = true, .write_files = false}).memory_bytes());
      CHECK((packed.evaluation > 0) == validated);
    }
  }
}

TEST_CASE("The roles at the arena's peak add up", "[memory_report]") {
  const auto communicator = make_local_communicator();
  for (const int micro_batches : {1, 4}) {
    TrainPlanOptions options = options_of(with_kind(small_config(), OptimizerKind::fira));
    options.micro_batches = micro_batches;
    const Packing packing = pack(record_train_plan(options, *communicator).plan, micro_batches);
    std::size_t sum = 0;
    for (const std::size_t bytes : packing.live_by_role) sum += bytes;
    CHECK(sum == packing.live_bytes);
    CHECK(packing.live_bytes <= packing.arena_bytes);
    CHECK(packing.live_by_role[static_cast<std::size_t>(Role::activation)] > 0);
    CHECK(packing.live_by_role[static_cast<std::size_t>(Role::state)] == 0);
  }
}

TEST_CASE("The largest micro-batch and rank stay within the budget", "[memory_report]") {
  const auto communicator = make_local_communicator();
  Config config = small_config();
  const MemoryReport open = memory_report(config, *communicator);
  for (const OptimizerMemory& memory : open.optimizers) {
    std::vector<std::int64_t> sizes;
    for (const MicroMemory& row : memory.micro) sizes.push_back(row.micro);
    CHECK(sizes == std::vector<std::int64_t>{1, 2, 3, 4, 6, 12});  // what divides the share of a rank
    CHECK(memory.micro[1].bytes == memory.packed.total());
    CHECK_FALSE(memory.largest_micro);
  }
  const OptimizerMemory& fira = of_kind(open, OptimizerKind::fira);

  config.memory.budget = fira.micro[3].bytes;
  CHECK(of_kind(memory_report(config, *communicator), OptimizerKind::fira).largest_micro == 4);
  config.memory.budget = fira.micro[3].bytes - 1;
  CHECK(of_kind(memory_report(config, *communicator), OptimizerKind::fira).largest_micro == 3);
  config.memory.budget = 1000;
  const MemoryReport none = memory_report(config, *communicator);
  CHECK_FALSE(of_kind(none, OptimizerKind::fira).largest_micro);
  CHECK_FALSE(of_kind(none, OptimizerKind::fira).largest_rank);

  config.memory.budget = fira.packed.total() + 2000;
  const auto rank = of_kind(memory_report(config, *communicator), OptimizerKind::fira).largest_rank;
  REQUIRE(rank);
  CHECK(*rank >= 8);
  Config one = with_kind(config, OptimizerKind::fira);
  one.optimizer.rank = *rank;
  CHECK(packed_memory(one, *communicator).total() <= *config.memory.budget);
  ++one.optimizer.rank;
  CHECK(packed_memory(one, *communicator).total() > *config.memory.budget);
  CHECK_FALSE(of_kind(memory_report(config, *communicator), OptimizerKind::adamw).largest_rank);
}

TEST_CASE("Presets are judged with the vocabulary of the data", "[memory_report]") {
  const auto communicator = make_local_communicator();
  Config config = small_config();
  config.memory.budget = 1'000'000'000;
  const MemoryReport report = memory_report(config, *communicator);
  REQUIRE(report.presets.size() == llama_preset_names().size());
  for (std::size_t p = 0; p < report.presets.size(); ++p) {
    LlamaConfig model = llama_preset(llama_preset_names()[p]);
    model.vocab = 100;
    CHECK(report.presets[p].parameters == model.parameter_count());
    for (const PresetMemory::Entry& entry : report.presets[p].optimizers)
      CHECK(entry.largest_micro.has_value() == (entry.smallest->bytes <= 1'000'000'000));
  }
  CHECK(report.presets.front().optimizers.front().largest_micro == 12);
  const PresetMemory::Entry& largest = report.presets.back().optimizers.front();
  CHECK_FALSE(largest.largest_micro);
  CHECK(largest.recompute == Recompute::block);  // the last way that was tried
}

TEST_CASE("JSON holds exact bytes and the tables say what fits", "[memory_report]") {
  const auto communicator = make_local_communicator();
  Config config = small_config();
  const MemoryReport open = memory_report(config, *communicator);
  CHECK(to_json(open).at("budget_bytes").is_null());
  CHECK_THAT(memory_tables(open), !ContainsSubstring("fits"));

  config.memory.budget = of_kind(open, OptimizerKind::adamw).micro[2].bytes;
  const MemoryReport report = memory_report(config, *communicator);
  const Json json = to_json(report);
  CHECK(json.at("parameters") == model_config(config).parameter_count());
  CHECK(json.at("optimizers").size() == optimizer_kinds().size());  // the CPU trains with each
  CHECK(json.at("states") == "fp32");
  const Json& adamw = json.at("optimizers").at(0);
  CHECK(adamw.at("optimizer") == "adamw");
  CHECK(adamw.at("formula").at("states") == 2 * 4 * model_config(config).parameter_count());
  CHECK(adamw.at("packed").at("states") == adamw.at("formula").at("states"));
  CHECK(adamw.at("largest_micro") == 3);
  CHECK(adamw.at("micro").at(2).at("fits") == true);
  CHECK(adamw.at("micro").at(3).at("fits") == false);
  CHECK(adamw.at("choice").at("recompute") == "none");
  CHECK(adamw.at("choice").at("recompute_layers").is_null());
  CHECK(adamw.at("recompute").size() == 3);
  CHECK(adamw.at("recompute").at(2).at("bytes") < adamw.at("recompute").at(0).at("bytes"));
  CHECK(adamw.at("recompute").at(2).at("largest_micro") >= adamw.at("largest_micro"));
  const std::string text = memory_tables(report);
  for (const char* part : {"mr + 2nr + 1", "largest within", " fits", "   no", "llama_350m", "training takes"})
    CHECK_THAT(text, ContainsSubstring(part));
}

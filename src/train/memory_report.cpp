#include "train/memory_report.h"

#include <algorithm>

namespace kiln {
namespace {

constexpr std::uint64_t kFloatBytes = sizeof(float);

std::uint64_t count(std::int64_t elements) { return static_cast<std::uint64_t>(elements); }

std::int64_t rank_share(const Config& config, int ranks) { return config.batch.sequences / ranks; }

TrainPlanOptions plan_options(const Config& config, int ranks) {
  const BatchShape micro = micro_batch(config, ranks);
  return {.model = model_config(config),
          .optimizer = optimizer_options(config),
          .micro = micro,
          .micro_batches = static_cast<int>(rank_share(config, ranks) / micro.sequences),
          .clip_norm = config.optimizer.clip_norm};
}

Config with_optimizer(Config config, OptimizerKind kind) {
  config.optimizer.kind = kind;
  return config;
}
Config with_micro(Config config, std::int64_t micro) {
  config.batch.micro = micro;
  return config;
}
/// The preset with the vocabulary of the configured model, which belongs to the data.
Config with_preset(Config config, std::string_view preset) {
  const std::int64_t vocab = model_config(config).vocab;
  config.model = {};
  config.model.preset = preset;
  config.model.vocab = vocab;
  return config;
}

/// What each layer keeps a token: inputs of the two norms and what they put out, their two 1/rms, q, k, v, what
/// attention puts out and the log of its denominator, gate, up and their product. The final norm keeps its input and
/// 1/rms, the classifier the gradient of its input and the loss.
std::uint64_t activation_elements(const LlamaConfig& c) {
  const std::int64_t heads = c.heads * c.head_dim, kv_heads = c.kv_heads * c.head_dim;
  const std::int64_t layer = 4 * c.hidden + 2 * heads + 2 * kv_heads + c.heads + 3 * c.ffn + 2;
  return count(c.layers * layer + 2 * c.hidden + 2);
}

std::uint64_t evaluation_bytes(const Config& config, const LlamaConfig& model, std::int64_t micro) {
  if (config.data.valid.empty()) return 0;
  Plan plan;
  record_llama(plan, model, DType::f32, {.sequences = micro, .seq_len = config.data.seq_len}, LlamaOutput::losses,
               config.data.seq_len);
  return pack(plan, 1).arena_bytes;
}

std::vector<std::int64_t> divisors(std::int64_t number) {
  std::vector<std::int64_t> list;
  for (std::int64_t d = 1; d <= number; ++d)
    if (number % d == 0) list.push_back(d);
  return list;
}

/// Every micro-batch that the trainer would accept.
std::vector<MicroMemory> micro_table(const Config& config, Communicator& communicator) {
  std::vector<MicroMemory> table;
  for (const std::int64_t micro : divisors(rank_share(config, communicator.size())))
    table.push_back({micro, packed_memory(with_micro(config, micro), communicator).total()});
  return table;
}

std::optional<std::int64_t> largest_within(const std::vector<MicroMemory>& table, std::uint64_t budget) {
  std::optional<std::int64_t> largest;
  for (const MicroMemory& row : table)
    if (row.bytes <= budget) largest = row.micro;
  return largest;
}

/// Memory grows with the rank, so the largest that fits is found by halving.
std::optional<std::int64_t> largest_rank(Config config, Communicator& communicator) {
  const LlamaConfig model = model_config(config);
  std::int64_t fits = 0, fails = std::min(model.hidden, model.ffn) + 1;
  while (fails - fits > 1) {
    config.optimizer.rank = (fits + fails) / 2;
    const bool within = packed_memory(config, communicator).total() <= *config.memory.budget;
    (within ? fits : fails) = config.optimizer.rank;
  }
  return fits > 0 ? std::optional(fits) : std::nullopt;
}

OptimizerMemory optimizer_memory(const Config& config, Communicator& communicator) {
  const TrainPlanOptions options = plan_options(config, communicator.size());
  OptimizerMemory memory{.kind = config.optimizer.kind,
                         .formula = memory_formula(record_train_plan(options, communicator), options),
                         .packed = packed_memory(config, communicator),
                         .micro = micro_table(config, communicator),
                         .largest_micro = {},
                         .largest_rank = {}};
  if (!config.memory.budget) return memory;
  memory.largest_micro = largest_within(memory.micro, *config.memory.budget);
  if (config.optimizer.kind != OptimizerKind::adamw) memory.largest_rank = largest_rank(config, communicator);
  return memory;
}

PresetMemory preset_memory(const Config& config, std::string_view name, Communicator& communicator) {
  const Config preset = with_preset(config, name);
  PresetMemory memory{
      .name = std::string(name), .parameters = model_config(preset).parameter_count(), .optimizers = {}};
  for (const OptimizerKind kind : optimizer_kinds()) {
    const Config one = with_optimizer(preset, kind);
    PresetMemory::Entry entry{.kind = kind, .smallest = {}, .largest_micro = {}};
    entry.smallest = {1, packed_memory(with_micro(one, 1), communicator).total()};
    if (config.memory.budget && entry.smallest.bytes <= *config.memory.budget)
      entry.largest_micro = largest_within(micro_table(one, communicator), *config.memory.budget);
    memory.optimizers.push_back(entry);
  }
  return memory;
}

}  // namespace

std::uint64_t state_elements(const Parameter& parameter, const OptimizerOptions& optimizer) {
  if (optimizer.kind == OptimizerKind::adamw || !parameter.low_rank) return 2 * count(parameter.shape.numel());
  const std::int64_t m = std::min(parameter.shape[0], parameter.shape[1]);
  const std::int64_t n = std::max(parameter.shape[0], parameter.shape[1]);
  const std::int64_t r = std::min(optimizer.rank, m);
  return count(m * r + 2 * n * r + (optimizer.kind == OptimizerKind::fira ? 1 : 0));
}

std::string_view state_formula(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::adamw:
      return "2mn";
    case OptimizerKind::galore:
      return "mr + 2nr";
    case OptimizerKind::fira:
      return "mr + 2nr + 1";
  }
  return "unknown";
}

MemoryFormula memory_formula(const TrainPlan& train, const TrainPlanOptions& options) {
  MemoryFormula formula;
  formula.weights = formula.gradients = kFloatBytes * count(options.model.parameter_count());
  for (const Parameter& parameter : train.table.parameters)
    formula.states += kFloatBytes * state_elements(parameter, options.optimizer);
  formula.activations = kFloatBytes * count(options.micro.tokens()) * activation_elements(options.model);
  for (const Node& node : train.plan.nodes())
    formula.workspace =
        std::max<std::uint64_t>(formula.workspace, node.op->workspace_bytes(train.plan.input_specs(node)));
  return formula;
}

PackedMemory packed_memory(const Config& config, Communicator& communicator) {
  const TrainPlanOptions options = plan_options(config, communicator.size());
  const TrainPlan train = record_train_plan(options, communicator);
  const Packing packing = pack(train.plan, options.micro_batches);
  const auto peak = [&](Role role) { return packing.live_by_role[static_cast<std::size_t>(role)]; };
  return {.weights = train.parameter_bytes(),
          .states = train.state_bytes(),
          .arena = packing.arena_bytes,
          .evaluation = evaluation_bytes(config, options.model, config.eval.micro.value_or(options.micro.sequences)),
          .peak_gradients = peak(Role::gradient),
          .peak_activations = peak(Role::activation),
          .peak_workspace = peak(Role::workspace)};
}

MemoryReport memory_report(const Config& config, Communicator& communicator) {
  const TrainPlanOptions options = plan_options(config, communicator.size());
  MemoryReport report{.name = config.run.name,
                      .model = options.model,
                      .micro = options.micro,
                      .micro_batches = options.micro_batches,
                      .rank = config.optimizer.rank,
                      .ranks = communicator.size(),
                      .budget = config.memory.budget,
                      .optimizers = {},
                      .presets = {}};
  for (const OptimizerKind kind : optimizer_kinds())
    report.optimizers.push_back(optimizer_memory(with_optimizer(config, kind), communicator));
  for (const std::string_view name : llama_preset_names())
    report.presets.push_back(preset_memory(config, name, communicator));
  return report;
}

}  // namespace kiln

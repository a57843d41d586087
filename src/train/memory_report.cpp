#include "train/memory_report.h"

#include <algorithm>

namespace kiln {
namespace {

std::uint64_t count(std::int64_t elements) { return static_cast<std::uint64_t>(elements); }

/// With int8, blocks of 256 share an f32 scale.
std::uint64_t stored(std::int64_t elements, StatePrecision precision) {
  switch (precision) {
    case StatePrecision::fp32:
      return 4 * count(elements);
    case StatePrecision::bf16:
      return 2 * count(elements);
    case StatePrecision::int8:
      return count(elements) + 4 * ((count(elements) + 255) / 256);
  }
  return 0;
}

/// What every number of a report is about: a device, and the ranks.
struct Site {
  const Backend& backend;
  Communicator& communicator;

  PackedMemory packed(const Config& config, const MemoryChoice& choice) const {
    return packed_memory(config, choice, backend, communicator);
  }
  MemoryChoice configured(const Config& config) const {
    return configured_memory(config, communicator.size(), backend);
  }
};

/// The preset with the vocabulary of the configured model, which belongs to the data.
Config with_preset(Config config, std::string_view preset) {
  const std::int64_t vocab = model_config(config).vocab;
  config.model = {};
  config.model.preset = preset;
  config.model.vocab = vocab;
  return config;
}

/// What the forward pass leaves, a token: elements in the model's dtype, and in f32 on a device (sums and logarithms).
struct KeptElements {
  std::int64_t real = 0, f32 = 0;
};
/// Of each layer the inputs of the two norms and what they put out, their two 1/rms, q, k, v, what attention puts out
/// and the log of its denominator, gate, up and their product; less what is recomputed. The final norm keeps its input
/// and 1/rms, the classifier the gradient of its input and the loss.
KeptElements kept_elements(const LlamaConfig& c, const Recomputation& recompute) {
  const std::int64_t heads = c.heads * c.head_dim, kv_heads = c.kv_heads * c.head_dim;
  KeptElements kept{.real = 2 * c.hidden, .f32 = 2};
  for (std::int64_t l = 0; l < c.layers; ++l) {
    KeptElements layer{.real = 4 * c.hidden + 2 * heads + 2 * kv_heads + 3 * c.ffn, .f32 = c.heads + 2};
    if (recompute.of(l) == Recompute::norms) layer.real -= 2 * c.hidden + c.ffn;
    if (recompute.of(l) == Recompute::block) layer = {.real = c.hidden, .f32 = 1};
    kept.real += layer.real;
    kept.f32 += layer.f32;
  }
  return kept;
}

std::vector<MicroMemory> micro_table(const Config& config, const Recomputation& recompute, const Site& site) {
  std::vector<MicroMemory> table;
  for (const std::int64_t micro : micro_batches_of(config, site.communicator.size())) {
    const MemoryChoice choice{.micro = {.sequences = micro, .seq_len = config.data.seq_len}, .recompute = recompute};
    table.push_back({micro, site.packed(config, choice).total()});
  }
  return table;
}

/// Memory grows with the micro-batch, so the largest that fits is found by halving.
std::optional<std::int64_t> largest_micro(const Config& config, const Recomputation& recompute, const Site& site) {
  if (!config.memory.budget) return {};
  const std::vector<std::int64_t> sizes = micro_batches_of(config, site.communicator.size());
  const auto fits = [&](std::int64_t micro) {
    const MemoryChoice choice{.micro = {.sequences = micro, .seq_len = config.data.seq_len}, .recompute = recompute};
    return site.packed(config, choice).total() <= *config.memory.budget;
  };
  const auto end = std::partition_point(sizes.begin(), sizes.end(), fits);
  return end == sizes.begin() ? std::nullopt : std::optional(*(end - 1));
}

/// Likewise with the rank.
std::optional<std::int64_t> largest_rank(Config config, const Site& site) {
  const LlamaConfig model = model_config(config);
  std::int64_t fits = 0, fails = std::min(model.hidden, model.ffn) + 1;
  while (fails - fits > 1) {
    config.optimizer.rank = (fits + fails) / 2;
    const bool within = site.packed(config, site.configured(config)).total() <= *config.memory.budget;
    (within ? fits : fails) = config.optimizer.rank;
  }
  if (!site.backend.is_host() && fits >= 8) fits -= fits % 8;  // kernels take eights
  return fits > 0 ? std::optional(fits) : std::nullopt;
}

OptimizerMemory optimizer_memory(const Config& config, const Site& site) {
  const MemoryChoice choice = site.configured(config);
  const TrainPlanOptions options = plan_options(config, choice, site.backend, site.communicator.size());
  OptimizerMemory memory{
      .kind = config.optimizer.kind,
      .formula = memory_formula(record_train_plan(options, site.communicator), options, site.backend),
      .packed = site.packed(config, choice),
      .micro = micro_table(config, choice.recompute, site),
      .largest_micro = largest_micro(config, choice.recompute, site),
      .largest_rank = {},
      .recompute = {},
      .choice = choice};
  for (const Recompute recompute : kRecomputes)
    memory.recompute.push_back({.recompute = recompute,
                                .bytes = site.packed(config, {choice.micro, recompute}).total(),
                                .largest_micro = largest_micro(config, recompute, site)});
  if (!config.memory.budget) return memory;
  memory.choice = memory_within(config, *config.memory.budget, site.backend, site.communicator);
  if (has_rank(config.optimizer.kind)) memory.largest_rank = largest_rank(config, site);
  return memory;
}

/// Why the device cannot train so; nothing when it can.
std::optional<std::string> refusal(const Config& config, const Site& site) {
  try {
    const TrainPlan train = record_train_plan(
        plan_options(config, site.configured(config), site.backend, site.communicator.size()), site.communicator);
    check_kernels(train.plan, site.backend);
  } catch (const Error& e) {
    if (e.code() == ExitCode::usage) return e.what();
    throw;
  }
  return {};
}

PresetMemory preset_memory(const Config& config, std::string_view name, const MemoryReport& report, const Site& site) {
  const Config preset = with_preset(config, name);
  PresetMemory memory{
      .name = std::string(name), .parameters = model_config(preset).parameter_count(), .optimizers = {}};
  for (const OptimizerMemory& optimizer : report.optimizers) {
    const Config one = with_optimizer(preset, optimizer.kind);
    PresetMemory::Entry entry{.kind = optimizer.kind, .smallest = {}, .largest_micro = {}};
    if (refusal(one, site)) {
      memory.optimizers.push_back(entry);
      continue;
    }
    for (const Recompute recompute : kRecomputes) {
      entry.recompute = config.memory.recompute.value_or(recompute);
      const BatchShape least{.sequences = micro_batches_of(one, site.communicator.size()).front(),
                             .seq_len = config.data.seq_len};
      entry.smallest = MicroMemory{least.sequences, site.packed(one, {least, entry.recompute}).total()};
      if (!config.memory.budget || config.memory.recompute || entry.smallest->bytes <= *config.memory.budget) break;
    }
    if (config.memory.budget && entry.smallest->bytes <= *config.memory.budget)
      entry.largest_micro = largest_micro(one, entry.recompute, site);
    memory.optimizers.push_back(entry);
  }
  return memory;
}

}  // namespace

std::uint64_t state_bytes(const Parameter& parameter, const OptimizerOptions& o) {
  const bool vector = parameter.shape.rank() == 1;
  const StatePrecision rest = o.kind == OptimizerKind::fira_plus ? StatePrecision::int8 : o.states;
  if (vector && rest == StatePrecision::int8) return 2 * stored(parameter.shape.numel(), StatePrecision::fp32);
  if (!parameter.low_rank) return 2 * stored(parameter.shape.numel(), rest);
  const std::int64_t m = std::min(parameter.shape[0], parameter.shape[1]);
  const std::int64_t n = std::max(parameter.shape[0], parameter.shape[1]);
  const std::int64_t r = std::min(o.rank, m);
  switch (o.kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::adam8bit:
      return 2 * stored(m * n, o.states);
    case OptimizerKind::galore:
      return stored(m * r, o.projector_states) + 2 * stored(n * r, o.states);
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
      return stored(m * r, o.projector_states) + 2 * stored(n * r, o.states) + 4;
    case OptimizerKind::apollo:
      return 2 * stored(n * r, o.states) + 4;
    case OptimizerKind::apollo_mini:
      return 2 * stored(n, o.states) + 4;
    case OptimizerKind::muon:
      return stored(m * n, o.states);
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return 4 * count((m + n) * r) + 2 * stored(m * r, o.states) + 2 * stored(n * r, o.states);
  }
  return 0;
}

std::string_view state_formula(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::adam8bit:
      return "2mn";
    case OptimizerKind::galore:
      return "mr + 2nr";
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
      return "mr + 2nr + 1";
    case OptimizerKind::apollo:
      return "2nr + 1";
    case OptimizerKind::apollo_mini:
      return "2n + 1";
    case OptimizerKind::muon:
      return "mn";
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return "3mr + 3nr";
  }
  return "unknown";
}

MemoryFormula memory_formula(const TrainPlan& train, const TrainPlanOptions& options, const Backend& backend) {
  const std::uint64_t real = size_of(options.layout.dtype), wide = sizeof(float);
  const std::uint64_t parameters = count(options.model.parameter_count()), tokens = count(options.micro.tokens());
  const KeptElements kept = kept_elements(options.model, options.recompute);
  MemoryFormula formula{.weights = parameters * (options.masters ? wide : real),
                        .gradients = {},
                        .activations = tokens * (real * count(kept.real) + wide * count(kept.f32))};
  for (const Parameter& parameter : train.table.parameters) {
    formula.states += state_bytes(parameter, options.optimizer);
    const bool half = parameter.low_rank && options.layout.linear_gradients == DType::bf16;
    formula.gradients += count(parameter.shape.numel()) * (half ? size_of(DType::bf16) : wide);
  }
  for (std::size_t n = 0; n < train.plan.nodes().size();) {
    const NodeGroup group = backend.group(train.plan, n);
    formula.workspace = std::max<std::uint64_t>(formula.workspace, backend.workspace_bytes(train.plan, group));
    n += group.count;
  }
  return formula;
}

MemoryReport memory_report(const Config& config, Communicator& communicator, const Backend& backend) {
  const Site site{backend, communicator};
  const MemoryChoice choice = site.configured(config);
  const TrainPlanOptions options = plan_options(config, choice, backend, communicator.size());
  MemoryReport report{
      .name = config.run.name,
      .device = backend.name(),
      .model = options.model,
      .micro = choice.micro,
      .recompute = choice.recompute,
      .micro_is_timed = !config.batch.micro && !needs_one_micro_batch(config) && !backend.is_host(),
      .micro_batches = options.micro_batches,
      .rank = config.optimizer.rank,
      .states = optimizer_options(config).states,
      .projector_states = config.optimizer.projector_states,
      .ranks = communicator.size(),
      .budget = config.memory.budget,
      .averages_host = average_host_bytes(config, record_train_plan(options, communicator).parameter_bytes(), backend),
      .optimizers = {},
      .refused = {},
      .presets = {}};
  for (const OptimizerKind kind : optimizer_kinds()) {
    const Config one = with_optimizer(config, kind);
    if (const std::optional<std::string> reason = refusal(one, site))
      report.refused.push_back({kind, *reason});
    else
      report.optimizers.push_back(optimizer_memory(one, site));
  }
  for (const std::string_view name : llama_preset_names())
    report.presets.push_back(preset_memory(config, name, report, site));
  return report;
}

}  // namespace kiln

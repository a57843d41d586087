#include "train/memory_plan.h"

#include <algorithm>

#include "train/device.h"
#include "train/trainer.h"

namespace kiln {
namespace {

std::int64_t rank_share(const Config& config, int ranks) { return config.batch.sequences / ranks; }

/// ModelInputs, in a device's memory.
std::uint64_t input_bytes(const LlamaConfig& model, std::int64_t tokens, std::int64_t positions) {
  const auto ints = static_cast<std::uint64_t>(2 * tokens + 1) * sizeof(std::int32_t);
  return ints + static_cast<std::uint64_t>(positions * model.head_dim) * sizeof(float) + scalars_spec().bytes();
}

std::uint64_t evaluation_bytes(const Config& config, const TrainPlanOptions& train, std::int64_t sequences,
                               const Backend& backend) {
  Plan plan;
  record_llama(plan, train.model, train.layout, {.sequences = sequences, .seq_len = config.data.seq_len},
               LlamaOutput::losses, config.data.seq_len);
  return pack(plan, 1, backend).arena_bytes;
}

/// The policy that the configuration sets, over its layers.
Recomputation configured_recomputation(const Config& config) {
  return {config.memory.recompute.value_or(Recompute::none),
          config.memory.recompute_layers.value_or(Recomputation::kAll)};
}

/// Every choice that the configuration leaves open, best first. Choices of one micro-batch and policy stand together,
/// by ascending layers and so descending bytes.
std::vector<MemoryChoice> candidates(const Config& config, int ranks, const Backend& backend) {
  const BatchShape preferred = micro_batch(config, ranks, backend);
  std::vector<std::int64_t> sizes{preferred.sequences};
  if (!config.batch.micro) {
    sizes = micro_batches_of(config, ranks);
    std::erase_if(sizes, [&](std::int64_t size) { return size > preferred.sequences; });
    std::ranges::reverse(sizes);
  }
  std::vector<Recompute> policies(std::begin(kRecomputes), std::end(kRecomputes));
  if (config.memory.recompute) policies = {*config.memory.recompute};
  const std::int64_t layers = model_config(config).layers;
  const auto small = [&](std::int64_t size) { return size * 8 < preferred.sequences; };
  std::vector<MemoryChoice> list;
  auto add = [&](std::int64_t size, Recompute policy) {
    const BatchShape micro{.sequences = size, .seq_len = config.data.seq_len};
    if (!config.memory.recompute && policy != Recompute::none)
      for (std::int64_t first = 1; first < layers; ++first) list.push_back({micro, {policy, first}});
    list.push_back({micro, config.memory.recompute ? configured_recomputation(config) : policy});
  };
  for (const Recompute policy : policies)
    for (const std::int64_t size : sizes)
      if (!small(size)) add(size, policy);
  for (const std::int64_t size : sizes)
    for (const Recompute policy : policies)
      if (small(size)) add(size, policy);
  return list;
}

/// Index of the first choice within the budget, or the number of choices.
std::size_t first_within(const std::vector<MemoryChoice>& list, const Config& config, std::uint64_t budget,
                         const Backend& backend, Communicator& communicator) {
  const auto fits = [&](std::size_t i) {
    return packed_memory(config, list[i], backend, communicator).total() <= budget;
  };
  for (std::size_t i = 0, end = 0; i < list.size(); i = end) {
    const auto alike = [&](const MemoryChoice& other) {
      return other.micro.sequences == list[i].micro.sequences && other.recompute.policy == list[i].recompute.policy;
    };
    while (end < list.size() && alike(list[end])) ++end;
    if (!fits(end - 1)) continue;
    std::size_t most = end - 1;  // fits; all before i do not
    while (i < most) {
      const std::size_t half = i + (most - i) / 2;
      if (fits(half))
        most = half;
      else
        i = half + 1;
    }
    return most;
  }
  return list.size();
}

}  // namespace

MemoryChoice configured_memory(const Config& config, int ranks, const Backend& backend) {
  return {.micro = micro_batch(config, ranks, backend), .recompute = configured_recomputation(config)};
}

TrainPlanOptions plan_options(const Config& config, const MemoryChoice& choice, const Backend& backend, int ranks) {
  const auto micro_batches = static_cast<int>(rank_share(config, ranks) / choice.micro.sequences);
  const LlamaConfig model = model_config(config);
  const OptimizerOptions optimizer = optimizer_options(config);
  const StorageLayout layout = training_layout(backend, config.precision.gradients, micro_batches, ranks);
  return {.model = model,
          .optimizer = optimizer,
          .micro = choice.micro,
          .micro_batches = micro_batches,
          .clip_norm = config.optimizer.clip_norm,
          .layout = layout_for_codes(model, optimizer, layout),
          .recompute = choice.recompute,
          .masters = keeps_masters(config, backend),
          .update_in_backward = config.memory.update == UpdatePlacement::in_backward};
}

PackedMemory packed_memory(const Config& config, const MemoryChoice& choice, const Backend& backend,
                           Communicator& communicator) {
  const TrainPlanOptions options = plan_options(config, choice, backend, communicator.size());
  const TrainPlan train = record_train_plan(options, communicator);
  const Packing packing = pack(train.plan, options.micro_batches, backend);
  const auto peak = [&](Role role) { return packing.live_by_role[static_cast<std::size_t>(role)]; };
  PackedMemory memory{.weights = train.parameter_bytes(),
                      .states = train.state_bytes(),
                      .arena = packing.arena_bytes,
                      .peak_gradients = peak(Role::gradient),
                      .peak_activations = peak(Role::activation),
                      .peak_workspace = peak(Role::workspace)};
  const std::int64_t length = config.data.seq_len, eval = config.eval.micro.value_or(choice.micro.sequences);
  if (!config.data.valid.empty()) memory.evaluation = evaluation_bytes(config, options, eval, backend);
  if (backend.is_host()) return memory;
  memory.inputs = backend.staging_bytes() +
                  input_bytes(options.model, rank_share(config, communicator.size()) * length, length) +
                  (config.data.valid.empty() ? 0 : input_bytes(options.model, eval * length, length)) +
                  (config.averages.empty() ? 0 : train.parameter_bytes());
  return memory;
}

PackedMemory packed_memory(const Config& config, Communicator& communicator) {
  Backend& cpu = cpu_backend();
  return packed_memory(config, configured_memory(config, communicator.size(), cpu), cpu, communicator);
}

bool needs_one_micro_batch(const Config& config) {
  return config.memory.update == UpdatePlacement::in_backward || config.precision.gradients == GradientPrecision::bf16;
}

std::vector<std::int64_t> micro_batches_of(const Config& config, int ranks) {
  const std::int64_t share = rank_share(config, ranks);
  if (needs_one_micro_batch(config)) return {share};
  std::vector<std::int64_t> list;
  for (std::int64_t size = 1; size <= share; ++size)
    if (share % size == 0) list.push_back(size);
  return list;
}

std::optional<MemoryChoice> memory_within(const Config& config, std::uint64_t budget, const Backend& backend,
                                          Communicator& communicator) {
  const std::vector<MemoryChoice> list = candidates(config, communicator.size(), backend);
  const std::size_t first = first_within(list, config, budget, backend, communicator);
  return first < list.size() ? std::optional(list[first]) : std::nullopt;
}

std::uint64_t memory_budget(const Config& config, const Backend& backend) {
  return config.memory.budget.value_or(backend.memory_bytes() / 100 * 92);
}

MemoryChoice choose_memory(const Config& config, const Backend& backend, Communicator& communicator) {
  const std::uint64_t budget = memory_budget(config, backend);
  if (budget == 0) return configured_memory(config, communicator.size(), backend);
  const std::vector<MemoryChoice> list = candidates(config, communicator.size(), backend);
  const std::size_t mine = first_within(list, config, budget, backend, communicator);
  // Ranks agree on the latest of their choices: the one of the rank with the least room.
  const auto agreed = static_cast<std::size_t>(communicator.maximum(static_cast<double>(mine)));
  if (agreed < list.size()) return list[agreed];
  const MemoryChoice& last = list.back();
  fail(ExitCode::resource,
       "{}: {} bytes, but training needs {} on each rank with a micro-batch of {} and memory.recompute {}; {}use a "
       "smaller model, data.seq_len or optimizer.rank",
       config.memory.budget ? "memory.budget" : backend.name(), budget,
       packed_memory(config, last, backend, communicator).total(), last.micro.sequences, to_string(last.recompute),
       config.batch.micro || config.memory.recompute ? "set batch.micro and memory.recompute to auto, or " : "");
}

}  // namespace kiln

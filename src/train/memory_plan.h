#pragma once
#include <cstdint>
#include <optional>

#include "dist/communicator.h"
#include "graph/backend.h"
#include "train/config.h"
#include "train/train_plan.h"

namespace kiln {

/// What `auto` stands for in batch.micro and memory.recompute.
struct MemoryChoice {
  BatchShape micro;
  Recomputation recompute = {};
};
/// As configured, whatever the memory: `auto` is micro_batch() and no recomputation.
MemoryChoice configured_memory(const Config& config, int ranks, const Backend& backend);

/// The plan that a rank records on a device.
TrainPlanOptions plan_options(const Config& config, const MemoryChoice& choice, const Backend& backend, int ranks);

/// Bytes of one rank as the trainer allocates them (Trainer::memory_bytes).
struct PackedMemory {
  std::uint64_t weights = 0, states = 0;
  std::uint64_t arena = 0;       // gradients, activations and workspace, packed by lifetime
  std::uint64_t evaluation = 0;  // the evaluator's arena, when there is validation data
  std::uint64_t inputs = 0;      // on a GPU: tokens, RoPE table, scalars and the staging of copies and averages
  std::uint64_t peak_gradients = 0, peak_activations = 0, peak_workspace = 0;  // at the arena's fullest moment
  std::uint64_t total() const { return weights + states + arena + evaluation + inputs; }
};
/// Records the plan and packs it; nothing is allocated, so that the backend may be one that only plans.
PackedMemory packed_memory(const Config& config, const MemoryChoice& choice, const Backend& backend,
                           Communicator& communicator);
/// As configured, on the CPU.
PackedMemory packed_memory(const Config& config, Communicator& communicator);

/// Whether a step must be a single micro-batch: updates in backward, or gradients in bf16.
bool needs_one_micro_batch(const Config& config);

/// Every micro-batch that divides the rank's share, ascending; the share alone where there may be but one.
std::vector<std::int64_t> micro_batches_of(const Config& config, int ranks);

/// The first within `budget` of: none, norms, block, each with micro-batches from micro_batch() down to an eighth of
/// it, since a smaller micro-batch costs less time than computing layers again; then ever smaller ones, each with the
/// cheapest recomputation. Of norms and block the fewest layers that suffice. What the configuration sets is not
/// varied. Nothing when none fits.
std::optional<MemoryChoice> memory_within(const Config& config, std::uint64_t budget, const Backend& backend,
                                          Communicator& communicator);

/// Bytes of one rank that a run may take: memory.budget, or on a GPU 92 % of its memory; 0 where neither is known.
std::uint64_t memory_budget(const Config& config, const Backend& backend);

/// What a run takes: memory_within() memory.budget or, on a GPU, 92 % of its memory (the rest is the driver's, the
/// libraries' and the graph's); as configured where neither is known. The same on every rank and at every start; on a
/// GPU time_micro_batches() may then take a neighbour. A resource Error says how many bytes the smallest choice needs.
/// Collective.
MemoryChoice choose_memory(const Config& config, const Backend& backend, Communicator& communicator);

}  // namespace kiln

#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/trainer.h"

namespace kiln {

/// Bytes of one rank by what they are for, each counted once and nothing reused: the paper's arithmetic.
struct MemoryFormula {
  std::uint64_t weights = 0, gradients = 0;
  std::uint64_t states = 0;       // state_elements over all parameters
  std::uint64_t activations = 0;  // what the forward pass leaves for the backward pass
  std::uint64_t workspace = 0;    // the largest of any op
  std::uint64_t total() const { return weights + gradients + states + activations + workspace; }
};
MemoryFormula memory_formula(const TrainPlan& plan, const TrainPlanOptions& options);

/// Elements of one parameter's optimizer states, for a matrix with sides m <= n and r = min(rank, m):
///   AdamW  2mn        GaLore  mr + 2nr        Fira  mr + 2nr + 1
/// The low-rank members keep 2mn where they do not project: embedding, head and norms.
std::uint64_t state_elements(const Parameter& parameter, const OptimizerOptions& optimizer);
std::string_view state_formula(OptimizerKind kind);

/// Bytes of one rank as the trainer allocates them (Trainer::memory_bytes); tokens and the RoPE table are left out.
struct PackedMemory {
  std::uint64_t weights = 0, states = 0;
  std::uint64_t arena = 0;       // gradients, activations and workspace, packed by lifetime
  std::uint64_t evaluation = 0;  // the evaluator's arena, when there is validation data
  std::uint64_t peak_gradients = 0, peak_activations = 0, peak_workspace = 0;  // at the arena's fullest moment
  std::uint64_t total() const { return weights + states + arena + evaluation; }
};
/// Records the plan of `config` and packs it; nothing is allocated.
PackedMemory packed_memory(const Config& config, Communicator& communicator);

struct MicroMemory {
  std::int64_t micro = 1;
  std::uint64_t bytes = 0;
};

struct OptimizerMemory {
  OptimizerKind kind;
  MemoryFormula formula;
  PackedMemory packed;
  std::vector<MicroMemory> micro;             // every micro-batch that divides the rank's share, ascending
  std::optional<std::int64_t> largest_micro;  // within the budget; nothing when none fits
  std::optional<std::int64_t> largest_rank;   // low-rank members, at the micro-batch of the configuration
};

struct PresetMemory {
  std::string name;
  std::int64_t parameters = 0;
  /// For each optimizer: bytes of its smallest micro-batch, and the largest one within the budget.
  struct Entry {
    OptimizerKind kind;
    MicroMemory smallest;
    std::optional<std::int64_t> largest_micro;
  };
  std::vector<Entry> optimizers;
};

struct MemoryReport {
  std::string name;  // of the run
  LlamaConfig model;
  BatchShape micro;
  std::int64_t micro_batches = 1, rank = 0;
  int ranks = 1;
  std::optional<std::uint64_t> budget;
  std::vector<OptimizerMemory> optimizers;
  std::vector<PresetMemory> presets;
};

/// What `kiln plan` reports: every optimizer of the family on the model of `config`, then every preset with its batch.
/// The budget is `memory.budget`. Nothing is allocated. Collective.
MemoryReport memory_report(const Config& config, Communicator& communicator);

Json to_json(const MemoryReport& report);
std::string memory_tables(const MemoryReport& report);

}  // namespace kiln

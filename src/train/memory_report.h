#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/memory_plan.h"
#include "train/trainer.h"

namespace kiln {

/// Bytes of one rank by what they are for, each counted once and nothing reused: the paper's arithmetic.
struct MemoryFormula {
  std::uint64_t weights = 0, gradients = 0;
  std::uint64_t states = 0;       // state_bytes over all parameters
  std::uint64_t activations = 0;  // what the forward pass leaves for the backward pass
  std::uint64_t workspace = 0;    // the largest of any op
  std::uint64_t total() const { return weights + gradients + states + activations + workspace; }
};
MemoryFormula memory_formula(const TrainPlan& plan, const TrainPlanOptions& options,
                             const Backend& backend = cpu_backend());

/// Bytes of one parameter's optimizer states. Elements for a matrix with sides m <= n and r = min(rank, m):
///   AdamW  2mn    GaLore  mr + 2nr    Fira  mr + 2nr + 1    APOLLO  2nr + 1, Mini r = 1    Muon  mn    LoRA  3mr + 3nr
/// Embedding, head and norms have Adam's 2mn in every member. Moments are stored in optimizer.states and the basis mr
/// in optimizer.projector_states, at 4, 2, or 1 + 4/256 bytes (a scale for each block of 256, rounded up; norms at
/// 4 there). The limiter's number and LoRA's mr + nr have 4 always. Fira+ has int8 states of embedding and head.
std::uint64_t state_bytes(const Parameter& parameter, const OptimizerOptions& optimizer);
std::string_view state_formula(OptimizerKind kind);

struct MicroMemory {
  std::int64_t micro = 1;
  std::uint64_t bytes = 0;
};

/// One way to recompute, at the micro-batch of the report.
struct RecomputeMemory {
  Recompute recompute = Recompute::none;
  std::uint64_t bytes = 0;
  std::optional<std::int64_t> largest_micro;  // within the budget
};

struct OptimizerMemory {
  OptimizerKind kind;
  MemoryFormula formula;
  PackedMemory packed;
  std::vector<MicroMemory> micro;             // every micro-batch that divides the rank's share, ascending
  std::optional<std::int64_t> largest_micro;  // within the budget; nothing when none fits
  std::optional<std::int64_t> largest_rank;   // low-rank members, at the micro-batch of the configuration
  std::vector<RecomputeMemory> recompute;     // every way, the cheapest in time first
  std::optional<MemoryChoice> choice;         // what training takes within the budget
};

struct PresetMemory {
  std::string name;
  std::int64_t parameters = 0;
  /// For each optimizer: bytes of its smallest micro-batch, and the largest one within the budget, both with the first
  /// way to recompute that makes the smallest fit (the last way when none does).
  struct Entry {
    OptimizerKind kind;
    Recompute recompute = Recompute::none;
    std::optional<MicroMemory> smallest;  // nothing: the device does not train this preset with this optimizer
    std::optional<std::int64_t> largest_micro;
  };
  std::vector<Entry> optimizers;
};

struct MemoryReport {
  std::string name;    // of the run
  std::string device;  // that it plans for
  LlamaConfig model;
  BatchShape micro;
  Recomputation recompute = {};  // of `packed` and `micro` below
  bool micro_is_timed = false;   // a run times neighbours of `micro` and may take one
  std::int64_t micro_batches = 1, rank = 0;
  StatePrecision states = StatePrecision::fp32, projector_states = StatePrecision::fp32;
  int ranks = 1;
  std::optional<std::uint64_t> budget;
  std::uint64_t averages_host = 0;  // host bytes of the first rank for `averages`, beside all others
  std::vector<OptimizerMemory> optimizers;
  struct Refused {
    OptimizerKind kind;
    std::string reason;
  };
  std::vector<Refused> refused;  // that the device cannot run
  std::vector<PresetMemory> presets;
};

/// What `kiln plan` reports: every optimizer of the family on the model of `config`, then every preset with its batch.
/// The budget is `memory.budget`. Nothing is allocated; the backend may be one that only plans. Collective.
MemoryReport memory_report(const Config& config, Communicator& communicator, const Backend& backend = cpu_backend());

Json to_json(const MemoryReport& report);
std::string memory_tables(const MemoryReport& report);

}  // namespace kiln

#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "optim/optimizer.h"

namespace kiln {

/// Validation perplexity of one member in a table; a table compares within itself alone, since data and steps differ.
struct MemberResult {
  OptimizerKind kind;
  double perplexity;
};

struct MemberTable {
  std::string_view model, source;
  std::int64_t parameters;
  std::span<const MemberResult> results;
};

/// The tables of the model size nearest to `parameters` (by ratio): published ones, each with the source that it names,
/// and the project's own (scripts/results/gpu_optimizers.md).
std::vector<MemberTable> nearest_results(std::int64_t parameters);

/// The members of a table that are in `candidates`, best first.
std::vector<MemberResult> ranked(const MemberTable& table, std::span<const OptimizerKind> candidates);

}  // namespace kiln

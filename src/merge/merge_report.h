#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace kiln {

/// One merged checkpoint, oldest first.
struct MergedCheckpoint {
  std::filesystem::path directory;
  std::optional<std::int64_t> step, tokens;
  double weight = 0.0;
  /// Implied decay of the update that led to this checkpoint; nothing for the oldest, and for weights that are no
  /// decay (see is_decay).
  std::optional<double> decay;
};

struct MergeReport {
  std::vector<MergedCheckpoint> checkpoints;
  std::uint64_t tensors = 0, elements = 0;
  std::uint64_t bytes_read = 0, bytes_written = 0;  // of tensors
  double seconds = 0.0;
};

/// A row as merge.json and `kiln merge --json` write it: path, step, tokens, weight, decay; null for what is unknown.
Json to_json(const MergedCheckpoint& row);
Json to_json(const MergeReport& report);

/// The table that `kiln merge` prints: checkpoint, step, weight, implied decay; then totals. Ends with a newline.
std::string merge_table(const MergeReport& report);

}  // namespace kiln

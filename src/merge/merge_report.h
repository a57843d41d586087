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
  /// Implied decay of the update that led to this checkpoint, from the weights divided by their sum; nothing for the
  /// oldest, and where a weight is negative.
  std::optional<double> decay;
};

struct MergeReport {
  std::vector<MergedCheckpoint> checkpoints;
  std::filesystem::path output{};
  std::vector<std::string> files{};  // of the output
  bool dry_run = false;              // inputs were verified, and nothing was written
  std::size_t input_files = 0;       // of models
  std::size_t verified_files = 0;    // of them: those whose hash was recorded, and compared
  std::uint64_t tensors = 0, elements = 0;
  std::uint64_t bytes_read = 0, bytes_written = 0;  // of tensors
  double seconds = 0.0;                             // in all
  double open_seconds = 0.0;                        // of it: opening and verifying the inputs
  double average_seconds = 0.0;  // of it: reading and averaging them, and handing the result to the system
};

/// A row as merge.json and `kiln merge --json` write it: path, step, tokens, weight, decay; null for what is unknown.
Json to_json(const MergedCheckpoint& row);
Json to_json(const MergeReport& report);

/// The table that `kiln merge` prints: checkpoint, step, weight, implied decay; a note where the weights do not sum to
/// 1, which scales the model; then totals, of a dry run with what was verified and what would be written. Ends with a
/// newline.
std::string merge_table(const MergeReport& report);

}  // namespace kiln

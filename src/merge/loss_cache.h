#pragma once
#include <filesystem>
#include <optional>
#include <span>

#include "base/json.h"
#include "merge/inputs.h"
#include "merge/sequence_loss.h"

namespace kiln {

/// Losses of merges that were evaluated before, a file each: `HASH.safetensors` below a directory that may be deleted
/// at any time. A file is named by, and holds, everything that its losses depend on: hashes and weights of the inputs
/// in their order, and what the caller says of the held-out set and of how it is evaluated. Losses of a snapshot that
/// has changed since are thus never found. Files are written whole or not at all.
class LossCache {
 public:
  /// `held_out` must tell apart any two ways to evaluate one model that differ by more than the rounding of another
  /// order of sums. Those that it does not tell apart share their losses, which are then equal up to that rounding: a
  /// caller whose `held_out` leaves some out says which.
  LossCache(std::filesystem::path directory, Json held_out);

  /// Nothing when they are not known, or the file is damaged (with a warning). The inputs must have been opened with
  /// verification.
  std::optional<SequenceLosses> find(std::span<const MergeInput* const> inputs, std::span<const double> weights) const;
  /// A resource Error when the disk is full.
  void store(std::span<const MergeInput* const> inputs, std::span<const double> weights,
             const SequenceLosses& losses) const;

 private:
  Json key(std::span<const MergeInput* const> inputs, std::span<const double> weights) const;

  std::filesystem::path directory_;
  Json held_out_;
};

}  // namespace kiln

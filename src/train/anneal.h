#pragma once
#include <cstdint>
#include <filesystem>

#include "train/trainer.h"

namespace kiln {

/// A branch of a run: its last steps again, on the identical batches, with a falling learning rate.
struct AnnealBranch {
  std::filesystem::path checkpoint;  // of the trunk, with optimizer states: where the branch begins
  std::int64_t end_step = 0;         // where it ends
  DecayShape shape = DecayShape::linear;
  double final_ratio = 0.0;
  std::filesystem::path run_dir;  // of the branch
};

/// The trunk's configuration with the branch's schedule and directory, no snapshots, averages or rescues, and every
/// checkpoint but the last dropped. A usage Error when the checkpoint is not before `end_step`, or lies in the trunk's
/// warm-up.
Config anneal_config(const Config& trunk, const AnnealBranch& branch);

/// Trains the branch and returns its last checkpoint. One that has ended is not trained again; one that was stopped
/// goes on from its own newest checkpoint. The signal that stopped it, if any, is left in `stopped_by`. Collective.
std::filesystem::path run_anneal(const Config& trunk, const AnnealBranch& branch, Communicator& communicator,
                                 const TrainerOptions& options, int& stopped_by);

}  // namespace kiln

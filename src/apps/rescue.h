#pragma once
#include <filesystem>

#include "dist/communicator.h"
#include "train/config.h"
#include "train/divergence.h"

namespace kiln {

/// Averages the newest `rescue.checkpoints` whole checkpoints before a divergence, optimizer states included, into
/// RUN/rescue_STEP (PMA, arXiv:2505.12082, section 4), and returns it: a checkpoint that the run resumes from, at the
/// step of the newest of them and with the sample after the offending batch; what happened stands in its state.json,
/// and in metrics.jsonl at the step that follows (RescueEvent). Where a low-rank projector makes moments of two
/// checkpoints belong to different bases, or they are quantised, the newest one's states are kept. Snapshots and
/// averages behind that step are removed first, since the run that goes on will not pass through them again. The first
/// rank writes; collective.
///
/// error  diverged: the run was rescued `rescue.limit` times, or has no checkpoint from before; those of
///        merge_checkpoints
std::filesystem::path rescue(const Config& config, const Divergence& divergence, Communicator& communicator);

}  // namespace kiln

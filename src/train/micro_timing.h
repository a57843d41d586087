#pragma once
#include "dist/communicator.h"
#include "graph/backend.h"
#include "train/config.h"
#include "train/memory_plan.h"

namespace kiln {

/// `choice` with the micro-batch that makes the step shortest on this GPU: `batch.micro: auto` asks for it. A smaller
/// one may keep activations in L2, a larger one reads the weights and their gradients less often.
///
/// Timed are divisors of a rank's share from a quarter to four times the choice's that fit `budget` bytes, some whole
/// steps of each, on rank 0; a larger one wins where they differ by less than 1 %. What is found is kept beside the
/// GEMM plans, by device, model, optimizer, precision and batch: a run resumes with the micro-batch that it started
/// with as long as that file stands. Where there is nothing to choose, or no directory to keep it in, the choice
/// stands. Collective.
MemoryChoice time_micro_batches(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                Backend& backend, Communicator& communicator);

}  // namespace kiln

#pragma once
#include <functional>

#include "dist/communicator.h"
#include "graph/backend.h"
#include "train/config.h"
#include "train/memory_plan.h"

namespace kiln {

/// Where what is timed is kept. Empty paths: nowhere.
struct MicroTimingFiles {
  std::filesystem::path run;    // RUN/micro_batch.json: what this run takes, at every start of it
  std::filesystem::path cache;  // of the machine: what other runs of the same shape found
};
/// Seconds of a whole step with a choice.
using StepTimer = std::function<double(const MemoryChoice&)>;

/// `choice` with the micro-batch that makes the step shortest on this GPU: `batch.micro: auto` asks for it. A smaller
/// one may keep activations in L2, a larger one reads the weights and adds to their gradients less often.
///
/// Candidates are the divisors of a rank's share from a quarter to four times the choice's that fit `budget` bytes,
/// from the largest down until one is clearly slower; of two that differ by less than 1 % the larger wins. Rank 0
/// times. The run's own file comes first, so that it resumes bit for bit on any machine, then the cache. Where a file
/// cannot be written or a step cannot be timed, a warning says so. Collective.
MemoryChoice time_micro_batches(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                const Backend& backend, Communicator& communicator, const MicroTimingFiles& files,
                                const StepTimer& timer);

/// Times with bench_step(), on synthetic tokens.
StepTimer bench_timer(const Config& config, Backend& backend, int ranks);

}  // namespace kiln

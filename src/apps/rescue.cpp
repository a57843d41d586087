#include "apps/rescue.h"

#include <algorithm>

#include "base/log.h"
#include "io/checkpoint.h"
#include "merge/streaming_merge.h"
#include "report/metrics.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

/// The newest `rescue.checkpoints` from before the step, oldest first.
std::vector<fs::path> checkpoints_before(const Config& config, std::int64_t step) {
  std::vector<fs::path> found = list_checkpoints(config.run.dir);
  std::erase_if(found, [&](const fs::path& path) { return checkpoint_step(path).value_or(step) >= step; });
  return select_checkpoints(found, static_cast<std::size_t>(config.rescue.checkpoints), 1);
}

OptimizerStateMerge state_merge(const fs::path& checkpoint) {
  for (const fs::directory_entry& entry : fs::directory_iterator(checkpoint)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("optimizer-") || !name.ends_with(".safetensors")) continue;
    if (lack_a_mean(SafetensorsReader(entry.path()))) return OptimizerStateMerge::keep_last;
  }
  return OptimizerStateMerge::average;
}

/// What was found, without the advice for a run that ends there.
std::string cause_of(const Divergence& divergence) {
  const std::string text = divergence.what();
  return text.substr(0, text.find("; "));
}

void merge_before(const Config& config, const Divergence& divergence, const std::vector<fs::path>& checkpoints,
                  const fs::path& out) {
  const RunPosition& at = divergence.at();
  const std::int64_t position = at.position + (config.rescue.skip - 1) * config.batch.sequences;
  const OptimizerStateMerge states = state_merge(checkpoints.back());
  MergeOptions options;
  options.inputs = checkpoints;
  options.output = out;
  options.optimizer_state = states;
  const RescueEvent event{.number = at.rescues + 1,
                          .step = at.step,
                          .resumed_step = checkpoint_step(checkpoints.back()).value(),
                          .oldest_step = checkpoint_step(checkpoints.front()).value(),
                          .checkpoints = static_cast<std::int64_t>(checkpoints.size()),
                          .optimizer_states = std::string(to_string(states)),
                          .reason = cause_of(divergence)};
  options.state = {{"data_position", position}, {"rescues", event.number}, {"rescued_from", to_json(event)}};
  merge_checkpoints(options);
  log_warning(
      "rescue {} of {}: {} is the mean of {} checkpoint{}, steps {} to {}, with optimizer states {}; training goes on "
      "after step {} at sample {}, {} batches behind the start of the offending one",
      event.number, config.rescue.limit, out.string(), event.checkpoints, event.checkpoints == 1 ? "" : "s",
      event.oldest_step, event.resumed_step, states == OptimizerStateMerge::average ? "averaged" : "of the newest",
      event.resumed_step, position, config.rescue.skip);
}

/// Snapshots and averages of the stretch that is dropped, which would pass for the run's own.
void remove_dropped(const Config& config, std::int64_t resumed) {
  const fs::path run = config.run.dir;
  std::vector<fs::path> homes{run / "snapshots"};
  if (fs::is_directory(run / "averages"))
    for (const fs::directory_entry& window : fs::directory_iterator(run / "averages")) homes.push_back(window.path());
  for (const fs::path& home : homes)
    if (const std::vector<fs::path> removed = remove_checkpoints_after(home, resumed); !removed.empty())
      log_warning("{}: {} director{} of steps that are dropped, {} to {}, removed", home.string(), removed.size(),
                  removed.size() == 1 ? "y" : "ies", checkpoint_step(removed.front()).value(),
                  checkpoint_step(removed.back()).value());
}

}  // namespace

fs::path rescue(const Config& config, const Divergence& divergence, Communicator& communicator) {
  const RunPosition& at = divergence.at();
  if (at.rescues >= config.rescue.limit)
    fail(ExitCode::diverged, "{}; no rescue is left of {} (rescue.limit)", divergence.what(), config.rescue.limit);
  std::vector<fs::path> checkpoints;
  if (communicator.rank() == 0) checkpoints = checkpoints_before(config, at.step);
  if (communicator.maximum(static_cast<double>(checkpoints.size())) == 0)
    fail(ExitCode::diverged, "{}; there is no checkpoint from before to merge (checkpoint.every: {})",
         divergence.what(), config.checkpoint.every);
  const fs::path out = fs::path(config.run.dir) / fmt::format("rescue_{:08}", at.step);
  if (communicator.rank() == 0) {
    log_warning("{}", divergence.what());
    // Before the merge, so that no kill leaves it beside them: until it stands, a resume from the newest checkpoint
    // writes them again bit for bit.
    remove_dropped(config, checkpoint_step(checkpoints.back()).value());
    merge_before(config, divergence, checkpoints, out);
  }
  communicator.barrier();
  return out;
}

}  // namespace kiln

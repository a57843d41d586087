#include "train/anneal.h"

#include "io/checkpoint.h"

namespace kiln {

Config anneal_config(const Config& trunk, const AnnealBranch& branch) {
  const auto begin = checkpoint_step(branch.checkpoint);
  check(begin.has_value(), "{}: is no checkpoint of a run (step_*); branch from one of those",
        branch.checkpoint.string());
  check(*begin < branch.end_step, "{}: an anneal from here to step {} has no steps; begin earlier",
        branch.checkpoint.string(), branch.end_step);
  check(*begin >= trunk.schedule.warmup_steps, "{}: lies in the warm-up of {} steps; anneal from a later checkpoint",
        branch.checkpoint.string(), trunk.schedule.warmup_steps);
  Config config = trunk;
  config.run.dir = branch.run_dir.string();
  config.run.name = branch.run_dir.filename().string();
  config.schedule.kind = ScheduleKind::wsd;
  config.schedule.total_steps = branch.end_step;
  config.schedule.decay_steps = branch.end_step - *begin;
  config.schedule.decay_shape = branch.shape;
  config.schedule.final_ratio = branch.final_ratio;
  config.snapshots.every = 0;
  config.averages.clear();
  config.run.on_divergence = OnDivergence::stop;
  config.rescue = {};
  config.checkpoint.keep = 1;
  validate(config);
  return config;
}

std::filesystem::path run_anneal(const Config& trunk, const AnnealBranch& branch, Communicator& communicator,
                                 const TrainerOptions& options, int& stopped_by) {
  const Config config = anneal_config(trunk, branch);
  const std::filesystem::path last = branch.run_dir / checkpoint_name(branch.end_step);
  stopped_by = 0;
  if (!checkpoint_fault(last, ManifestCheck::sizes)) return last;
  Trainer trainer(config, communicator, options);
  if (!trainer.resume_latest()) trainer.resume(branch.checkpoint);
  stopped_by = trainer.run().stopped_by;
  return last;
}

}  // namespace kiln

#include <set>

#include "train/config.h"
#include "train/device.h"
#include "train/trainer.h"

namespace kiln {
namespace {

void at_least(std::string_view key, std::int64_t value, std::int64_t least) {
  check(value >= least, "{}: {}, expected at least {}", key, value, least);
}

void check_schedule(const ScheduleOptions& s) {
  check(s.peak_lr > 0, "schedule.peak_lr: {}, expected a positive number", s.peak_lr);
  at_least("schedule.warmup_steps", s.warmup_steps, 0);
  at_least("schedule.total_steps", s.total_steps, 1);
  at_least("schedule.decay_steps", s.decay_steps, 0);
  check(s.warmup_steps <= s.total_steps, "schedule.warmup_steps: {}, expected at most schedule.total_steps {}",
        s.warmup_steps, s.total_steps);
  if (s.kind == ScheduleKind::wsd)
    check(s.warmup_steps + s.decay_steps <= s.total_steps,
          "schedule.decay_steps: {} after a warm-up of {}, expected at most {} steps in all", s.decay_steps,
          s.warmup_steps, s.total_steps);
  check(s.final_ratio >= 0 && s.final_ratio <= 1, "schedule.final_ratio: {}, expected 0 to 1", s.final_ratio);
}

void check_averages(const std::vector<AverageWindow>& windows) {
  constexpr std::size_t kMost = 16;  // their losses share one line of metrics.jsonl
  check(windows.size() <= kMost, "averages: {} windows, expected at most {}", windows.size(), kMost);
  std::set<std::string> names;
  for (const AverageWindow& window : windows) {
    at_least("averages: every", window.every, 1);
    at_least("averages: count", window.count, 1);
    check(names.insert(to_string(window)).second, "averages: {{every: {}, count: {}}} is given twice; keep one",
          window.every, window.count);
  }
}

void check_rescue(const Config& config) {
  at_least("rescue.checkpoints", config.rescue.checkpoints, 1);
  at_least("rescue.limit", config.rescue.limit, 0);
  at_least("rescue.skip", config.rescue.skip, 0);
  if (config.rescue.spike)
    check(*config.rescue.spike > 1, "rescue.spike: {}, expected more than 1, such as 2", *config.rescue.spike);
  if (config.run.on_divergence == OnDivergence::stop) return;
  check(config.checkpoint.every > 0, "run.on_divergence: merge needs checkpoints; set checkpoint.every");
  check(config.checkpoint.keep == 0 || config.checkpoint.keep >= config.rescue.checkpoints,
        "checkpoint.keep: {}, but rescue.checkpoints merges {}; keep as many", config.checkpoint.keep,
        config.rescue.checkpoints);
}

void check_recompute(const Config& config) {
  if (!config.memory.recompute_layers) return;
  at_least("memory.recompute_layers", *config.memory.recompute_layers, 1);
  check(config.memory.recompute && *config.memory.recompute != Recompute::none,
        "memory.recompute_layers: {}, but memory.recompute is {}; set it to norms or block, or leave the number out",
        *config.memory.recompute_layers, config.memory.recompute ? "none" : "auto");
}

}  // namespace

void validate(const Config& config) {
  check_schedule(config.schedule);
  at_least("data.seq_len", config.data.seq_len, 1);
  at_least("batch.sequences", config.batch.sequences, 1);
  if (config.batch.micro) at_least("batch.micro", *config.batch.micro, 1);
  if (config.eval.micro) at_least("eval.micro", *config.eval.micro, 1);
  if (config.run.threads) at_least("run.threads", *config.run.threads, 1);
  at_least("checkpoint.every", config.checkpoint.every, 0);
  at_least("checkpoint.keep", config.checkpoint.keep, 0);
  at_least("snapshots.every", config.snapshots.every, 0);
  check_averages(config.averages);
  check_rescue(config);
  check_recompute(config);
  at_least("eval.every", config.eval.every, 0);
  at_least("eval.tokens", config.eval.tokens, 1);
  check(config.parallel.zero == 0 || config.parallel.zero == 1, "parallel.zero: {}, expected 0 or 1",
        config.parallel.zero);
  check(config.optimizer.clip_norm >= 0, "optimizer.clip_norm: {}, expected at least 0", config.optimizer.clip_norm);
  make_optimizer(optimizer_options(config));  // checks its own options
  if (!config.model.preset.empty() || config.model.hidden) model_config(config).validate();
}

void check_supported(const Config& config, Device automatic) {
  auto refuse = [](std::string_view setting, std::string_view use) {
    fail(ExitCode::usage, "{} is not available in this version; use {}", setting, use);
  };
  // Without a device, run.device: cuda is refused where it is opened, which knows why there is none.
  const Device device = config.run.device == Device::automatic ? automatic : config.run.device;
  if (config.precision.weights != WeightPrecision::fp32 && device == Device::cpu)
    refuse("precision.weights: bf16_sr on the CPU", "precision.weights: fp32, or a GPU");
  if (config.parallel.zero != 0) refuse("parallel.zero: 1", "parallel.zero: 0");
  check(!config.run.dir.empty(), "run.dir is missing; name the directory of the run");
  check(!config.model.preset.empty() || config.model.hidden.has_value(),
        "model is missing; set model.preset, or model.hidden with the other sizes");
  check(!config.data.train.empty(), "data.train is missing; name token shards, made with `kiln tokenize`");
}

void check_supported(const Config& config) {
  check_supported(config, cuda_device_present() ? Device::cuda : Device::cpu);
}

}  // namespace kiln

#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/log.h"
#include "base/signals.h"
#include "io/checkpoint.h"
#include "ops/rope.h"
#include "report/progress.h"
#include "report/tensorboard.h"
#include "train/model_files.h"
#include "train/schedule.h"
#include "train/step_bench.h"

namespace kiln {
namespace {

/// A step's wall clock in milliseconds.
class Stopwatch {
 public:
  double ms() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

std::filesystem::path snapshots_of(const Config& config) { return std::filesystem::path(config.run.dir) / "snapshots"; }

}  // namespace

/// Rank 0's outputs; made when the run starts, so that a resumed run continues its files at the right step.
struct Trainer::Outputs {
  Outputs(const Config& config, std::int64_t step, const TrainerOptions& options)
      : directory(config.run.dir), metrics(directory, step), tensorboard(directory / "tensorboard", step) {
    write_text_atomic(directory / "config.yaml", to_yaml(config));
    if (!options.quiet)
      progress.emplace(ProgressOptions{.first_step = step, .total_steps = config.schedule.total_steps});
    steps_per_s.reserve(static_cast<std::size_t>(std::max<std::int64_t>(0, config.schedule.total_steps - step)));
  }

  void write(const StepMetrics& step) {
    metrics.write(step);
    tensorboard.step(step);
    if (progress) progress->update(step);
    steps_per_s.push_back(step.tokens_per_s);
  }

  double median_tokens_per_s() const {
    if (steps_per_s.empty()) return 0;
    std::vector<double> sorted = steps_per_s;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }

  std::filesystem::path directory;
  MetricsWriter metrics;
  TensorBoardWriter tensorboard;
  std::optional<ProgressLine> progress;
  std::vector<double> steps_per_s;
};

Trainer::Trainer(const Config& config, Communicator& communicator, TrainerOptions options)
    : config_(config),
      communicator_(communicator),
      options_(options),
      model_(model_config(config)),
      micro_(micro_batch(config, communicator.size())),
      data_(config.data.train, config.data.seq_len, model_.vocab, config.run.seed),
      train_(record_train_plan({.model = model_,
                                .optimizer = optimizer_options(config),
                                .micro = micro_,
                                .micro_batches = micro_batches(),
                                .clip_norm = config.optimizer.clip_norm},
                               communicator)),
      weights_(model_, DType::f32),
      states_(train_),
      tokens_({{config.batch.sequences / communicator.size() * config.data.seq_len}, DType::i32}, "tokens"),
      targets_(tokens_.view().spec, "targets"),
      first_({{1}, DType::i32}),
      rope_table_({{config.data.seq_len, model_.head_dim}, DType::f32}),
      scalars_(scalars_spec()),
      executor_(train_.plan, micro_batches()) {
  // Found out now, not at the first checkpoint.
  if (!config.data.tokenizer.empty() && !std::filesystem::is_regular_file(config.data.tokenizer))
    fail(ExitCode::data, "data.tokenizer: {}: no such file; make it with `kiln tokenize`, or leave the key out",
         config.data.tokenizer);
  initialise(weights_, config.run.seed);
  fill_rope_table(rope_table_.view(), model_.rope_base);
  for (std::size_t s = 0; s < train_.values.storages.size(); ++s)
    executor_.bind(train_.values.storages[s], weights_.storage(s));
  for (std::size_t p = 0; p < train_.states.size(); ++p)
    for (std::size_t s = 0; s < train_.states[p].size(); ++s) executor_.bind(train_.states[p][s], states_.tensor(p, s));
  executor_.bind(train_.values.first, first_.view());
  executor_.bind(train_.values.rope_table, rope_table_.view());
  executor_.bind(train_.values.scalars, scalars_.view());
  if (!config.data.valid.empty()) {
    valid_.emplace(config.data.valid, config.data.seq_len, model_.vocab, config.run.seed);
    evaluator_ =
        std::make_unique<Evaluator>(weights_, config.eval.micro.value_or(micro_.sequences), config.data.seq_len);
  }
}

Trainer::~Trainer() = default;

int Trainer::micro_batches() const {
  return static_cast<int>(config_.batch.sequences / communicator_.size() / micro_.sequences);
}

RunState Trainer::run_state() const {
  return {.weights = weights_, .states = states_, .config = to_json(config_), .tokenizer = config_.data.tokenizer};
}

bool Trainer::resume_latest() {
  const std::vector<std::filesystem::path> found = list_checkpoints(config_.run.dir);
  if (found.empty()) return false;
  resume(found.back());
  return true;
}

void Trainer::resume(const std::filesystem::path& checkpoint) {
  at_ = load_checkpoint(checkpoint, run_state());
  if (communicator_.rank() == 0) log_info("resumed {} at step {}", checkpoint.string(), at_.step);
}

void Trainer::initialise_from(const std::filesystem::path& model) {
  load_weights(model, weights_);
  if (communicator_.rank() == 0) log_info("weights of {}", model.string());
}

/// Fills this rank's share of the global batch; returns the number of targets that count, over all ranks.
double Trainer::load_batch() {
  const std::int64_t share = config_.batch.sequences / communicator_.size();
  const auto length = static_cast<std::size_t>(config_.data.seq_len);
  const std::span<std::int32_t> tokens = tokens_.span<std::int32_t>(), targets = targets_.span<std::int32_t>();
  for (std::int64_t i = 0; i < share; ++i)
    data_.sample(at_.position + communicator_.rank() * share + i,
                 tokens.subspan(static_cast<std::size_t>(i) * length, length),
                 targets.subspan(static_cast<std::size_t>(i) * length, length));
  const auto counted = std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; });
  return communicator_.sum(static_cast<double>(counted));
}

void Trainer::stop_if_diverged(double loss) const {
  if (std::isfinite(loss)) return;
  fail(ExitCode::diverged,
       "{}: the loss of step {} is {}, expected a finite number; the last checkpoint stands: lower schedule.peak_lr or "
       "optimizer.clip_norm and resume",
       config_.run.dir, at_.step + 1, loss);
}

StepMetrics Trainer::step() {
  const Stopwatch watch;
  const Tensor scalars = scalars_.view();
  const double counted = load_batch();
  scalar(scalars, Scalar::step) = static_cast<double>(at_.step + 1);
  scalar(scalars, Scalar::lr) = learning_rate(config_.schedule, at_.step + 1);
  scalar(scalars, Scalar::loss_scale) = 1.0 / counted;

  double loss = 0;
  for (int m = 0; m < micro_batches(); ++m) {
    executor_.bind(train_.values.tokens, tokens_.view().rows(m * micro_.tokens(), micro_.tokens()));
    executor_.bind(train_.values.targets, targets_.view().rows(m * micro_.tokens(), micro_.tokens()));
    executor_.run(Phase::micro, m > 0);
    for (const float l : executor_.tensor(train_.values.losses).span<float>()) loss += static_cast<double>(l);
  }
  loss = communicator_.sum(loss) / counted;
  stop_if_diverged(loss);
  executor_.run(Phase::update, false);
  stop_if_diverged(scalar(scalars, Scalar::grad_norm));

  at_.step += 1;
  at_.position += config_.batch.sequences;
  at_.tokens += config_.batch.sequences * config_.data.seq_len;
  train_loss_ = loss;
  const double ms = watch.ms();
  const double tokens = static_cast<double>(config_.batch.sequences * config_.data.seq_len);
  const double tokens_per_s = tokens / ms * 1e3;
  return {.step = at_.step,
          .tokens = at_.tokens,
          .loss = loss,
          .lr = scalar(scalars, Scalar::lr),
          .grad_norm = scalar(scalars, Scalar::grad_norm),
          .step_ms = ms,
          .tokens_per_s = tokens_per_s,
          .mfu = peak_flops_per_s_ > 0 ? tokens_per_s * model_.flops_per_token(config_.data.seq_len) / peak_flops_per_s_
                                       : std::nan(""),
          .memory_bytes = memory_bytes()};
}

Evaluation Trainer::evaluate() {
  check(valid_.has_value(), "data.valid: not set, but an evaluation was asked for");
  return evaluator_->run(*valid_, samples_for_tokens(*valid_, config_.eval.tokens), communicator_);
}

std::size_t Trainer::memory_bytes() const {
  return weights_.bytes() + states_.bytes() + executor_.packing().arena_bytes +
         (evaluator_ ? evaluator_->arena_bytes() : 0);
}

void Trainer::save(const char* what) {
  if (options_.write_files && communicator_.rank() == 0) {
    save_checkpoint(std::filesystem::path(config_.run.dir) / checkpoint_name(at_.step), run_state(), at_);
    prune_checkpoints(config_.run.dir, static_cast<int>(config_.checkpoint.keep));
    if (outputs_ && outputs_->progress) outputs_->progress->message(fmt::format("{} at step {}", what, at_.step));
  }
  communicator_.barrier();
}

void Trainer::snapshot() {
  if (options_.write_files && communicator_.rank() == 0)
    save_snapshot(snapshots_of(config_) / checkpoint_name(at_.step), run_state(), at_, config_.snapshots.dtype);
  communicator_.barrier();
}

TrainSummary Trainer::summary() const {
  return {.at = at_,
          .train_loss = train_loss_,
          .valid_loss = valid_loss_,
          .state_bytes = states_.bytes(),
          .memory_bytes = memory_bytes(),
          .parameters = model_.parameter_count(),
          .tokens_per_s = outputs_ ? outputs_->median_tokens_per_s() : 0};
}

TrainSummary Trainer::run() {
  const std::int64_t total = config_.schedule.total_steps;
  if (options_.write_files && communicator_.rank() == 0)
    outputs_ = std::make_unique<Outputs>(config_, at_.step, options_);
  double rate = 0;
  for (const GemmRate& library : bench_gemm(1024, 1024, 1024, 2)) rate = std::max(rate, library.flops_per_s);
  peak_flops_per_s_ = communicator_.sum(rate);

  auto due = [](std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; };
  bool saved = true;
  while (at_.step < total) {
    StepMetrics metrics = step();
    saved = false;
    if (valid_ && (due(config_.eval.every, at_.step) || at_.step == total))
      metrics.valid_loss = valid_loss_ = evaluate().loss;
    if (outputs_) outputs_->write(metrics);
    if (due(config_.snapshots.every, at_.step) && snapshot_due_phase(config_, at_.step)) snapshot();
    if (due(config_.checkpoint.every, at_.step)) {
      save("checkpoint");
      saved = true;
    }
    const int signal = options_.stop_on_signal ? static_cast<int>(communicator_.maximum(stop_signal())) : 0;
    if (signal != 0) {
      if (!saved) save("checkpoint before stopping");
      TrainSummary stopped = summary();
      stopped.stopped_by = signal;
      if (outputs_ && outputs_->progress) outputs_->progress->finish();
      return stopped;
    }
  }
  if (!saved) save("last checkpoint");
  if (outputs_ && outputs_->progress) outputs_->progress->finish();
  return summary();
}

}  // namespace kiln

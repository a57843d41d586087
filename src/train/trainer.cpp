#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/files.h"
#include "base/log.h"
#include "base/signals.h"
#include "dist/device_communicator.h"
#include "io/checkpoint.h"
#include "report/progress.h"
#include "report/tensorboard.h"
#include "train/device.h"
#include "train/divergence.h"
#include "train/micro_timing.h"
#include "train/model_files.h"
#include "train/schedule.h"
#include "train/step_bench.h"

namespace kiln {
namespace {

bool due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }

std::filesystem::path snapshots_of(const Config& config) { return std::filesystem::path(config.run.dir) / "snapshots"; }
std::filesystem::path averages_of(const Config& config) { return std::filesystem::path(config.run.dir) / "averages"; }

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

namespace {

/// What the configuration leaves open.
MemoryChoice open_memory(const Config& config, Backend& backend, Communicator& communicator, bool write_files) {
  const MemoryChoice choice = choose_memory(config, backend, communicator);
  if (config.batch.micro || needs_one_micro_batch(config) || backend.is_host()) return choice;
  MicroTimingFiles files{.run = {}, .cache = cache_file("micro-batches.json")};
  if (write_files) files.run = std::filesystem::path(config.run.dir) / "micro_batch.json";
  return time_micro_batches(config, choice, memory_budget(config, backend), backend, communicator, files,
                            bench_timer(config, backend, communicator.size()));
}

/// Refused before any memory is taken where the device lacks a kernel.
TrainPlan runnable_plan(const TrainPlanOptions& options, Communicator& communicator, const Backend& backend) {
  TrainPlan train = record_train_plan(options, communicator);
  check_kernels(train.plan, backend);
  return train;
}

}  // namespace

Trainer::Trainer(const Config& config, Communicator& communicator, TrainerOptions options)
    : config_(config),
      communicator_(communicator),
      options_(options),
      model_(model_config(config)),
      data_(config.data.train, config.data.seq_len, model_.vocab, config.run.seed),
      backend_(open_device(config.run.device)),
      device_communicator_(make_device_communicator(communicator, *backend_)),
      memory_(open_memory(config, *backend_, device_communicator_ ? *device_communicator_ : communicator,
                          options.write_files)),
      micro_(memory_.micro),
      train_(runnable_plan(plan_options(config, memory_, *backend_, communicator.size()),
                           device_communicator_ ? *device_communicator_ : communicator, *backend_)),
      weights_(model_, DType::f32),
      states_(weights_.table(), *train_.optimizer),
      device_weights_(weights_, train_.layout, keeps_masters(config, *backend_), *backend_, config.run.seed),
      device_states_(train_, states_, *backend_),
      tokens_(static_cast<std::size_t>(config.batch.sequences / communicator.size() * config.data.seq_len)),
      targets_(tokens_.size()),
      inputs_(*backend_, model_, device_weights_.layout(), static_cast<std::int64_t>(tokens_.size()),
              config.data.seq_len),
      executor_(train_.plan, micro_batches(), *backend_),
      replay_(backend_->replay(train_.plan)) {
  // Found out now, not at the first checkpoint.
  if (!config.data.tokenizer.empty() && !std::filesystem::is_regular_file(config.data.tokenizer))
    fail(ExitCode::data, "data.tokenizer: {}: no such file; make it with `kiln tokenize`, or leave the key out",
         config.data.tokenizer);
  launched_.reserve(2);
  if (!options.quiet && communicator.rank() == 0 && (config.memory.budget || !backend_->is_host()))
    log_info("micro-batches of {} sequences, memory.recompute {}", micro_.sequences, to_string(memory_.recompute));
  bind_training(executor_, train_, device_weights_, device_states_);
  inputs_.bind(executor_, train_.values);
  if (!config.data.valid.empty()) {
    valid_.emplace(config.data.valid, config.data.seq_len, model_.vocab, config.run.seed);
    evaluator_ =
        std::make_unique<Evaluator>(device_weights_, config.eval.micro.value_or(micro_.sequences), config.data.seq_len);
  }
  if (config.rescue.spike && communicator.rank() == 0) spike_.emplace(*config.rescue.spike);
  if (!config.averages.empty())
    averages_ = std::make_unique<Averages>(config, device_weights_, communicator.rank() == 0,
                                           [this](const FinishedAverage& average) { write(average); });
}

Trainer::~Trainer() = default;

int Trainer::micro_batches() const {
  return static_cast<int>(config_.batch.sequences / communicator_.size() / micro_.sequences);
}

const ModelWeights& Trainer::weights() const {
  device_weights_.pull();
  return weights_;
}

const OptimizerStates& Trainer::states() const {
  device_states_.pull();
  return states_;
}

RunState Trainer::run_state(Holds what) const {
  return {.weights = weights(),
          .states = what == Holds::everything ? states() : states_,
          .config = to_json(config_),
          .tokenizer = config_.data.tokenizer,
          .averages = averages_.get()};
}

bool Trainer::resume_latest() {
  const std::vector<std::filesystem::path> found = list_checkpoints(config_.run.dir);
  if (found.empty()) return false;
  resume(found.back());
  return true;
}

void Trainer::resume(const std::filesystem::path& checkpoint) {
  at_ = load_checkpoint(checkpoint, {weights_, states_, {}, {}, averages_.get()});
  rescue_ = rescue_of(checkpoint);
  device_weights_.push();
  device_states_.push();
  if (communicator_.rank() == 0) log_info("resumed {} at step {}", checkpoint.string(), at_.step);
}

void Trainer::initialise_from(const std::filesystem::path& model) {
  load_weights(model, weights_);
  device_weights_.push();
  if (communicator_.rank() == 0) log_info("weights of {}", model.string());
}

bool Trainer::initialise_states_from(const std::filesystem::path& merge) {
  const bool found = load_states(merge, states_);
  device_states_.push();
  return found;
}

/// Hands this rank's share of the next global batch to the device; returns the targets that count, over all ranks.
double Trainer::load_batch() {
  const std::int64_t share = config_.batch.sequences / communicator_.size();
  const auto length = static_cast<std::size_t>(config_.data.seq_len);
  for (std::int64_t i = 0; i < share; ++i)
    data_.sample(at_.position + communicator_.rank() * share + i,
                 std::span(tokens_).subspan(static_cast<std::size_t>(i) * length, length),
                 std::span(targets_).subspan(static_cast<std::size_t>(i) * length, length));
  backend_->upload(inputs_.tokens.view(), tokens_.data());
  backend_->upload(inputs_.targets.view(), targets_.data());
  const auto counted = std::ranges::count_if(targets_, [](std::int32_t t) { return t >= 0; });
  return communicator_.sum(static_cast<double>(counted));
}

/// Throws a Divergence. The update of a step whose loss or norm is not finite changed nothing (optim/optimizer.h).
void Trainer::stop_if_diverged(const RunPosition& at, double grad_norm) {
  std::string why;
  if (!std::isfinite(train_loss_) || !std::isfinite(grad_norm))
    why = fmt::format("the {} of step {} is {}, expected a finite number",
                      std::isfinite(train_loss_) ? "gradient norm" : "loss", at.step,
                      std::isfinite(train_loss_) ? grad_norm : train_loss_);
  else if (spike_ && (*spike_)(train_loss_))
    why = fmt::format("the loss of step {} is {:.4f}, expected at most {} times the median {:.4f} (rescue.spike)",
                      at.step, train_loss_, *config_.rescue.spike, spike_->median());
  bool diverged = !why.empty();
  // Ranks that may be rescued, or do not look for spikes themselves, all follow the one that saw it.
  if (config_.rescue.spike || config_.run.on_divergence == OnDivergence::merge)
    diverged = communicator_.maximum(diverged ? 1 : 0) > 0;
  if (!diverged) return;
  if (why.empty()) why = fmt::format("step {} diverged, as another rank saw", at.step);
  backend_->synchronize();  // the next step may be under way, and memory be freed when this is caught
  launched_.clear();
  throw Divergence(fmt::format("{}: {}; the last checkpoint stands: lower schedule.peak_lr or optimizer.clip_norm and "
                               "resume",
                               config_.run.dir, why),
                   at);
}

/// All the work of a step on the device; the same at every step, so that a device can replay it.
void Trainer::run_plan() {
  for (int m = 0; m < micro_batches(); ++m) {
    inputs_.bind(executor_, train_.values, m * micro_.tokens());
    executor_.run(Phase::micro, m > 0);
  }
  executor_.run(Phase::update, false);
}

StepMetrics Trainer::step() {
  launch();
  return collect();
}

void Trainer::launch() {
  check(launched_.size() < 2, "Trainer::launch: two steps are under way already");
  const auto begin = std::chrono::steady_clock::now();
  const double counted = load_batch();
  StepScalars scalars{};
  scalar(scalars, Scalar::step) = static_cast<double>(at_.step + 1);
  scalar(scalars, Scalar::lr) = learning_rate(config_.schedule, at_.step + 1);
  scalar(scalars, Scalar::loss_scale) = 1.0 / counted;
  inputs_.set_scalars(*backend_, scalars);
  replay_->run([this] { run_plan(); });
  at_.step += 1;
  at_.position += config_.batch.sequences;
  at_.tokens += config_.batch.sequences * config_.data.seq_len;
  launched_.push_back({.at = at_,
                       .counted = counted,
                       .lr = scalar(scalars, Scalar::lr),
                       .fetch = backend_->fetch(inputs_.scalars.view()),
                       .begin = begin,
                       .average_ms = averages_ ? averages_->take(at_) : std::nullopt});
}

StepMetrics Trainer::collect() {
  check(!launched_.empty(), "Trainer::collect: no step was launched");
  const Launched step = launched_.front();
  launched_.erase(launched_.begin());
  StepScalars scalars{};
  backend_->collect(step.fetch, scalars.data());
  train_loss_ = communicator_.sum(scalar(scalars, Scalar::loss)) / step.counted;
  stop_if_diverged(step.at, scalar(scalars, Scalar::grad_norm));

  // With two steps under way, the device began this one when it had finished the one before.
  const auto end = std::chrono::steady_clock::now();
  const double ms = std::chrono::duration<double, std::milli>(end - std::max(step.begin, collected_)).count();
  collected_ = end;
  const double tokens_per_s = static_cast<double>(config_.batch.sequences * config_.data.seq_len) / ms * 1e3;
  return {.step = step.at.step,
          .tokens = step.at.tokens,
          .loss = train_loss_,
          .lr = step.lr,
          .grad_norm = scalar(scalars, Scalar::grad_norm),
          .step_ms = ms,
          .tokens_per_s = tokens_per_s,
          .mfu = peak_flops_per_s_ > 0 ? tokens_per_s * model_.flops_per_token(config_.data.seq_len) / peak_flops_per_s_
                                       : std::nan(""),
          .memory_bytes = memory_bytes(),
          .average_ms = step.average_ms};
}

Evaluation Trainer::evaluate() {
  check(valid_.has_value(), "data.valid: not set, but an evaluation was asked for");
  return evaluator_->run(*valid_, samples_for_tokens(*valid_, config_.eval.tokens), communicator_);
}

std::size_t Trainer::memory_bytes() const {
  if (!backend_->is_host()) return backend_->allocated_bytes();
  return weights_.bytes() + states_.bytes() + executor_.packing().arena_bytes +
         (evaluator_ ? evaluator_->arena_bytes() : 0);
}

void Trainer::save(const char* what) {
  if (averages_) settle_averages();
  if (options_.write_files && communicator_.rank() == 0) {
    save_checkpoint(std::filesystem::path(config_.run.dir) / checkpoint_name(at_.step), run_state(Holds::everything),
                    at_);
    prune_checkpoints(config_.run.dir, static_cast<int>(config_.checkpoint.keep));
    if (outputs_ && outputs_->progress) outputs_->progress->message(fmt::format("{} at step {}", what, at_.step));
  }
  communicator_.barrier();
}

void Trainer::snapshot() {
  if (options_.write_files && communicator_.rank() == 0)
    save_snapshot(snapshots_of(config_) / checkpoint_name(at_.step), run_state(Holds::weights), at_,
                  config_.snapshots.dtype);
  communicator_.barrier();
}

/// Called on another thread; reads nothing that training changes.
void Trainer::write(const FinishedAverage& average) const {
  if (!options_.write_files) return;
  const RunPosition& at = average.taken.back();
  save_snapshot(averages_of(config_) / ("window_" + average.name) / checkpoint_name(at.step),
                {*average.weights, states_, to_json(config_), config_.data.tokenizer}, at, DType::f32,
                provenance(average));
}

/// Evaluates and reports the averages that a step completed.
void Trainer::evaluate_averages(StepMetrics& metrics) {
  for (const std::size_t window : averages_->to_evaluate()) {
    const auto begin = std::chrono::steady_clock::now();
    averages_->evaluate(window, [&](const FinishedAverage& average) {
      const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
      metrics.average_ms = metrics.average_ms.value_or(0) + ms.count();
      stop_if_not_finite(average.finite ? nullptr : &average);
      for (std::size_t s = 0; s < device_weights_.count(); ++s) {
        const Tensor storage = average.weights->storage(s);
        communicator_.broadcast({static_cast<std::byte*>(storage.data), storage.bytes()});
      }
      device_weights_.with(*average.weights, [&] { metrics.average_loss.push_back({average.name, evaluate().loss}); });
      if (outputs_ && outputs_->progress)
        outputs_->progress->message(fmt::format("average {} at step {}: validation loss {:.4f}", average.name, at_.step,
                                                metrics.average_loss.back().loss));
    });
  }
  collected_ = std::chrono::steady_clock::now();
}

/// All averages of steps up to here are on disk afterwards.
void Trainer::settle_averages() {
  const std::optional<FinishedAverage> damaged = averages_->settle();
  stop_if_not_finite(damaged ? &*damaged : nullptr);
}

/// Every rank leaves together, so that the run can be rescued; null where this rank knows of none.
void Trainer::stop_if_not_finite(const FinishedAverage* damaged) {
  if (communicator_.maximum(damaged != nullptr ? 1 : 0) == 0) return;
  const std::string what = damaged == nullptr
                               ? "an average, as the first rank saw,"
                               : fmt::format("the average {} up to step {}", damaged->name, damaged->taken.back().step);
  throw Divergence(fmt::format("{}: {} is not finite; resume from an older checkpoint", config_.run.dir, what), at_);
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

bool Trainer::pauses_after(std::int64_t step) const {
  return step == config_.schedule.total_steps || (valid_ && due(config_.eval.every, step)) ||
         due(config_.snapshots.every, step) || due(config_.checkpoint.every, step) ||
         (averages_ && !averages_->to_evaluate().empty());
}

/// Evaluation, log, snapshot and checkpoint of a step; true when it was saved.
bool Trainer::after_step(StepMetrics& metrics) {
  const std::int64_t step = metrics.step;
  if (valid_ && (due(config_.eval.every, step) || step == config_.schedule.total_steps)) {
    metrics.valid_loss = valid_loss_ = evaluate().loss;
    collected_ = std::chrono::steady_clock::now();
  }
  // Of two steps under way, the newer one may have completed it.
  if (averages_ && step == at_.step) evaluate_averages(metrics);
  metrics.rescue = std::exchange(rescue_, std::nullopt);
  if (outputs_) outputs_->write(metrics);
  if (due(config_.snapshots.every, step) && snapshot_due_phase(config_, step)) snapshot();
  const bool saves = due(config_.checkpoint.every, step);
  if (saves) save("checkpoint");
  return saves;
}

TrainSummary Trainer::run() {
  const std::int64_t total = config_.schedule.total_steps;
  if (options_.write_files && communicator_.rank() == 0)
    outputs_ = std::make_unique<Outputs>(config_, at_.step, options_);
  // A resumed run judges losses by those before it, as one that never stopped.
  if (outputs_ && spike_)
    for (const StepMetrics& before : read_metrics(outputs_->directory / "metrics.jsonl")) (*spike_)(before.loss);
  double rate = published_flops_per_s(*backend_);
  if (backend_->is_host())
    for (const GemmRate& library : bench_gemm(1024, 1024, 1024, 2)) rate = std::max(rate, library.flops_per_s);
  peak_flops_per_s_ = communicator_.sum(rate);

  bool saved = true;
  while (at_.step < total || !launched_.empty()) {
    if (launched_.empty()) launch();
    // The device goes on while the host writes this step's metrics, unless the host must see the weights in between.
    if (!backend_->is_host() && at_.step < total && !pauses_after(at_.step)) launch();
    StepMetrics metrics = collect();
    saved = after_step(metrics);
    const int signal = options_.stop_on_signal ? static_cast<int>(communicator_.maximum(stop_signal())) : 0;
    if (signal != 0) {
      for (; !launched_.empty(); saved = after_step(metrics)) metrics = collect();
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

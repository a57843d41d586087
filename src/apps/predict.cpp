#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

#include "apps/commands.h"
#include "base/files.h"
#include "base/log.h"
#include "base/signals.h"
#include "core/parallel.h"
#include "io/checkpoint.h"
#include "merge/prediction_report.h"
#include "report/html.h"
#include "train/anneal.h"
#include "train/device.h"
#include "train/sequence_evaluator.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct PredictArguments {
  fs::path run;
  double share = 0.1;
  std::int64_t end = 0, tokens = 0;
  std::string shape, data, device = "cpu";
  double final_ratio = -1;
  std::vector<std::size_t> counts{2, 3, 5, 10, 15}, strides{1, 2, 4, 8};
  double alpha = 0.1;
  std::vector<fs::path> calibrate;
  bool anneal_check = false, json = false, quiet = false;
};

/// A run of which nothing is known but its files would silently add nothing, and its curve be taken from another.
void check_metrics(const fs::path& run, const std::string& what) {
  if (!fs::exists(run / "metrics.jsonl"))
    fail(ExitCode::data, "{}: {}holds no metrics.jsonl, from which losses and learning rates are taken; {}",
         run.string(), what,
         what.empty() ? "restore the file, or name a run directory of `kiln train`"
                      : "name a run directory of `kiln train`, or leave it out");
}

/// The trunk's configuration with what the command line overrides.
Config run_config(const PredictArguments& arguments) {
  check(fs::exists(arguments.run / "config.yaml"), "{}: holds no config.yaml; name a run directory of `kiln train`",
        arguments.run.string());
  check_metrics(arguments.run, "");
  for (const fs::path& run : arguments.calibrate) {
    check_metrics(run, "given as --calibrate, and ");
    check(!fs::equivalent(run, arguments.run),
          "{}: --calibrate names the run itself, whose earlier anneals count "
          "anyway; name other runs",
          run.string());
  }
  Config config = load_config(arguments.run / "config.yaml", {});
  config.run.dir = arguments.run.string();
  if (!arguments.data.empty()) config.data.valid = {{.pattern = arguments.data}};
  if (arguments.tokens > 0) config.eval.tokens = arguments.tokens;
  check(!config.data.valid.empty(), "{}: data.valid is not set; name held-out shards with --data",
        (arguments.run / "config.yaml").string());
  return config;
}

/// Whole snapshots of a constant rate, up to --end, oldest first.
std::vector<fs::path> constant_snapshots(const PredictArguments& arguments, const Config& config) {
  const fs::path directory = arguments.run / "snapshots";
  std::vector<fs::path> chosen;
  if (fs::is_directory(directory))
    for (const fs::path& path : list_checkpoints(directory)) {
      const std::int64_t step = checkpoint_step(path).value_or(0);
      const bool wanted = arguments.end == 0 || step <= arguments.end;
      if (wanted && in_constant_phase(config.schedule, step)) chosen.push_back(path);
    }
  if (chosen.size() < 2)
    fail(ExitCode::data,
         "{}: holds {} snapshots of a constant learning rate, and 2 or more are needed; train with snapshots.every and "
         "a constant or wsd schedule",
         directory.string(), chosen.size());
  const std::int64_t last = checkpoint_step(chosen.back()).value();
  check(arguments.end == 0 || last == arguments.end, "--end: step {} has no snapshot; the nearest before is {}",
        arguments.end, last);
  return chosen;
}

/// The path whose step is nearest to `step`, of those before `end` and after warm-up.
fs::path nearest_step(const std::vector<fs::path>& paths, const Config& config, std::int64_t step, std::int64_t end,
                      const std::string& what) {
  fs::path best;
  for (const fs::path& path : paths) {
    const std::int64_t at = checkpoint_step(path).value_or(-1);
    if (at >= end || at < 1 || !in_constant_phase(config.schedule, at)) continue;
    if (best.empty() || std::abs(at - step) < std::abs(checkpoint_step(best).value() - step)) best = path;
  }
  if (best.empty())
    fail(ExitCode::data,
         "{}: no {} of a constant learning rate lies before step {}; keep more of them (checkpoint.keep: 0)",
         config.run.dir, what, end);
  return best;
}

/// What run_anneal is asked for, from the checkpoint on which the anneal branches off.
AnnealBranch branch_of(const PredictArguments& arguments, const Anneal& anneal, const fs::path& checkpoint) {
  return {.checkpoint = checkpoint,
          .end_step = anneal.end,
          .shape = anneal.shape,
          .final_ratio = anneal.final_ratio,
          .run_dir = arguments.run / "anneals" / anneal_name(anneal)};
}

fs::path train_branch(const Config& config, const AnnealBranch& branch, Communicator& communicator, bool quiet) {
  check_supported(config);
  install_stop_signals();
  int stopped_by = 0;
  const fs::path last = run_anneal(config, branch, communicator, {.quiet = quiet}, stopped_by);
  if (stopped_by != 0) throw CLI::RuntimeError(128 + stopped_by);
  return last;
}

/// The held-out data, and the device that evaluates weights on them.
class HeldOut {
 public:
  HeldOut(const Config& config, Device device, const ModelWeights& weights)
      : config_(config),
        device_(device),
        weights_(weights),
        data_(config.data.valid, config.data.seq_len, weights.config().vocab, config.run.seed),
        samples_(samples_for_tokens(data_, config.eval.tokens)),
        backend_(open_device(device)) {}
  std::string precision() const { return storage_layout(*backend_).dtype == DType::f32 ? "f32" : "bf16"; }

  /// What a model's losses depend on besides its weights: the program, the device by its name, precision, model, passes
  /// and tokens. Not told apart are the libraries that the program loads and, on a GPU, the algorithms of its GEMMs:
  /// neither the plans, of which the evaluation itself times those that are missing, nor cuBLASLt's version. Losses of
  /// one identity are the same bits as long as those libraries stay and, on a GPU, the file of GEMM plans; without them
  /// they are equal up to the rounding of another algorithm.
  Json identity() const {
    return {{"program", hash_file("/proc/self/exe")},
            {"device", backend_->name()},
            {"precision", precision()},
            {"sequences", samples_},
            {"seq_len", config_.data.seq_len},
            {"sequences_at_once", sequences_at_once()},
            {"data", hash_samples()},
            {"model", to_hf_config(weights_.config(), "float32")}};
  }

  /// Losses by sequence of what the weights hold, as the merge library takes them.
  SequenceLosses evaluate() {
    if (!evaluator_) open();
    on_device_->push();
    SequenceLosses losses;
    for (const SequenceEvaluator::Loss& loss : evaluator_->run(data_, samples_)) {
      losses.nats.push_back(loss.nats);
      losses.targets.push_back(loss.targets);
    }
    return losses;
  }
  /// Gives its device's memory back, which training counts on.
  void close() {
    evaluator_.reset();
    on_device_.reset();
    backend_.reset();
  }

 private:
  void open() {
    if (!backend_) backend_ = open_device(device_);
    on_device_ = std::make_unique<DeviceWeights>(weights_, storage_layout(*backend_), false, *backend_);
    evaluator_ = std::make_unique<SequenceEvaluator>(*on_device_, sequences_at_once(), config_.data.seq_len);
  }
  std::int64_t sequences_at_once() const {
    return std::min(samples_, config_.eval.micro.value_or(micro_batch(config_, 1, *backend_).sequences));
  }
  /// Of the tokens and targets themselves, wherever they come from.
  std::string hash_samples() const {
    const auto length = static_cast<std::size_t>(config_.data.seq_len);
    std::vector<std::int32_t> sample(2 * length);
    std::string hashes;
    for (std::int64_t i = 0; i < samples_; ++i) {
      data_.sample(i, std::span(sample).first(length), std::span(sample).last(length));
      hashes += hash_bytes(std::as_bytes(std::span(sample)));
    }
    return hash_bytes(std::as_bytes(std::span(hashes)));
  }

  const Config& config_;
  Device device_;
  const ModelWeights& weights_;
  Dataset data_;
  std::int64_t samples_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<DeviceWeights> on_device_;
  std::unique_ptr<SequenceEvaluator> evaluator_;
};

/// Curves and checks of the run before the anneal's end, and of the runs to calibrate on.
struct Evidence {
  std::vector<LossCurve> curves;
  std::vector<AnnealCheck> checks;
};

Evidence read_evidence(const PredictArguments& arguments, std::int64_t end) {
  Evidence evidence{.curves = read_curves(arguments.run, end), .checks = {}};
  for (const AnnealCheck& check : read_checks(arguments.run))
    if (check.anneal.end < end) evidence.checks.push_back(check);
  for (const fs::path& run : arguments.calibrate) {
    for (LossCurve& curve : read_curves(run, std::numeric_limits<std::int64_t>::max()))
      evidence.curves.push_back(std::move(curve));
    for (const AnnealCheck& check : read_checks(run)) evidence.checks.push_back(check);
  }
  return evidence;
}

void run(const PredictArguments& arguments) {
  const auto communicator = make_communicator();
  check(communicator->size() == 1, "predict runs on one rank, found {}; start it without mpirun", communicator->size());
  const Config config = run_config(arguments);
  set_thread_count(rank_threads(config));
  const std::vector<fs::path> paths = constant_snapshots(arguments, config);
  Anneal anneal{.end = checkpoint_step(paths.back()).value(),
                .shape = arguments.shape.empty() ? config.schedule.decay_shape : parse_decay_shape(arguments.shape),
                .final_ratio = arguments.final_ratio < 0 ? config.schedule.final_ratio : arguments.final_ratio};
  const auto wanted = anneal.end - static_cast<std::int64_t>(arguments.share * static_cast<double>(anneal.end));
  const fs::path start = arguments.anneal_check
                             ? nearest_step(list_checkpoints(arguments.run), config, wanted, anneal.end, "checkpoint")
                             : nearest_step(paths, config, wanted, anneal.end, "snapshot");
  anneal.begin = checkpoint_step(start).value();
  if (const std::int64_t steps = anneal.end - wanted; 2 * anneal.steps() < steps || anneal.steps() > 2 * steps)
    log_warning("--share {}: {} steps, but the nearest {} lies {} before the end", arguments.share, steps,
                arguments.anneal_check ? "checkpoint" : "snapshot", anneal.steps());

  const std::vector<MergeInput> snapshots = open_inputs(paths, Hashes::all);
  const ModelWeights weights(model_config(config), DType::f32);
  HeldOut held_out(config, parse_device(arguments.device), weights);
  const LossCache known(arguments.run / "predictions", held_out.identity());
  const Evidence evidence = read_evidence(arguments, anneal.end);
  PredictionRequest request{.snapshots = snapshots,
                            .anneal = anneal,
                            .counts = arguments.counts,
                            .strides = arguments.strides,
                            .ema_alpha = arguments.alpha,
                            .curves = evidence.curves,
                            .checks = evidence.checks,
                            .weights = weights,
                            .evaluate = [&] { return held_out.evaluate(); },
                            .evaluated_in = held_out.precision(),
                            .known = &known,
                            .run_anneal = {}};
  const AnnealBranch branch = branch_of(arguments, anneal, start);
  if (arguments.anneal_check)
    request.run_anneal = [&] {
      held_out.close();
      return train_branch(config, branch, *communicator, arguments.quiet || arguments.json);
    };
  const Prediction prediction = predict(request);
  if (prediction.annealed_loss) write_check(branch.run_dir, check_of(prediction));
  write_text_atomic(arguments.run / "prediction.json", to_json(prediction).dump(2) + "\n");
  write_report({arguments.run}, arguments.run / "prediction.html", "Predicted anneal");
  if (arguments.json)
    std::puts(to_json(prediction).dump(2).c_str());
  else if (!arguments.quiet)
    fmt::print("{}plots: {}\n", prediction_text(arguments.run.string(), prediction),
               (arguments.run / "prediction.html").string());
}

}  // namespace

void add_predict_command(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("predict", "Predict the loss of an annealed model from constant-rate snapshots");
  const auto a = std::make_shared<PredictArguments>();
  command->add_option("RUN_DIR", a->run, "Run with snapshots of a constant learning rate")->required();
  command->add_flag("--anneal-check", a->anneal_check, "Train a real anneal from a checkpoint, and report every error");
  command->add_option("--share", a->share, "Steps of the anneal, as a share of all steps up to its end")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 0.9));
  command->add_option("--end", a->end, "Step of the snapshot at which the anneal ends; 0: the newest")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--shape", a->shape, "linear, cosine or 1-sqrt; otherwise schedule.decay_shape of the run");
  command->add_option("--final-ratio", a->final_ratio, "Last rate over the peak; otherwise schedule.final_ratio")
      ->check(CLI::Range(0.0, 1.0));
  constexpr auto kMost = std::numeric_limits<std::int32_t>::max();
  command->add_option("--counts", a->counts, "N of the sweep")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(2, kMost));
  command->add_option("--strides", a->strides, "V of the sweep, in snapshots")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(1, kMost));
  command->add_option("--alpha", a->alpha, "Of the EMA")->capture_default_str();
  command->add_option("--data", a->data, "Held-out token shards; otherwise data.valid of the run");
  command->add_option("--tokens", a->tokens, "Held-out tokens; 0: eval.tokens of the run")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option(
          "--device", a->device,
          "Where models are evaluated: cpu (f32), cuda (bf16 products, sums in f32) or auto; the anneal trains "
          "on the run's")
      ->capture_default_str();
  command->add_option(
      "--calibrate", a->calibrate,
      "Other runs whose anneal checks and curves count as earlier ones; of checks, those of the same shape, "
      "final ratio and share");
  command->add_flag("--json", a->json, "Print one JSON object");
  command->add_flag("--quiet", a->quiet, "Print nothing; RUN_DIR/prediction.json and prediction.html are written");
  command->footer(
      "Example:\n  kiln predict runs/fira60m --anneal-check --share 0.1\n"
      "An anneal is kept in RUN_DIR/anneals; later predictions of the run learn from its error.");
  command->callback([a] { run(*a); });
}

}  // namespace kiln

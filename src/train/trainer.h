#pragma once
#include <chrono>
#include <memory>
#include <optional>

#include "dist/communicator.h"
#include "graph/executor.h"
#include "io/dataset.h"
#include "report/metrics.h"
#include "train/averages.h"
#include "train/config.h"
#include "train/device_memory.h"
#include "train/evaluator.h"
#include "train/loss_spike.h"
#include "train/memory_plan.h"
#include "train/run_state.h"
#include "train/train_plan.h"

namespace kiln {

/// What a run reports at its end, and `summary.json` keeps.
struct TrainSummary {
  RunPosition at;
  double train_loss = 0;             // of the last step
  std::optional<double> valid_loss;  // of the last evaluation
  std::size_t state_bytes = 0;       // of the optimizer
  std::size_t memory_bytes = 0;      // of one rank: weights, states, arenas
  std::int64_t parameters = 0;
  double tokens_per_s = 0;  // median over steps
  int stopped_by = 0;       // signal, after a clean save
};

/// Which optional outputs a run has.
struct TrainerOptions {
  bool quiet = false;          // no progress line
  bool write_files = true;     // run directory: metrics, checkpoints, snapshots
  bool stop_on_signal = true;  // SIGINT and SIGTERM save and stop
};

/// Data-parallel training of one configuration. Every rank makes one; all calls are collective. Not thread-safe.
///
/// error  configuration (exit 2), data (3), memory or disk (4), a Divergence (5: the last checkpoint stands; a step
///        whose loss is not finite is not applied)
class Trainer {
 public:
  Trainer(const Config& config, Communicator& communicator, TrainerOptions options = {});
  ~Trainer();

  /// Goes on from the newest whole checkpoint of the run directory; false when there is none.
  bool resume_latest();
  /// Goes on from a checkpoint directory.
  void resume(const std::filesystem::path& checkpoint);

  /// Starts at step 0 from the weights of a model directory (a merge, or an import); optimizer states stay empty.
  void initialise_from(const std::filesystem::path& model);
  /// Takes the optimizer states that a merge carries; false when it carries none.
  bool initialise_states_from(const std::filesystem::path& merge);

  /// Trains to the configured number of steps: step, log, evaluate, snapshot, checkpoint.
  TrainSummary run();

  /// THE step: one global batch through the model, and the update. Returns its metrics.
  StepMetrics step();
  /// Its two halves: launch() hands the step to the device, collect() waits for the oldest one handed over. A device
  /// that is not the host may have two steps under way, so that it never waits for the host.
  void launch();
  StepMetrics collect();

  /// Mean loss over `eval.tokens` of the validation data.
  Evaluation evaluate();

  const RunPosition& at() const { return at_; }
  /// Weights and states on the host, after the last step launched; waits for it.
  const ModelWeights& weights() const;
  const OptimizerStates& states() const;
  std::size_t memory_bytes() const;

 private:
  struct Outputs;  // what the run directory and the terminal receive; rank 0 alone

  int micro_batches() const;
  double load_batch();
  void run_plan();
  /// What of the device's memory a file holds, and has to be copied for it.
  enum class Holds { weights, everything };
  RunState run_state(Holds what) const;
  bool pauses_after(std::int64_t step) const;
  bool after_step(StepMetrics& metrics);
  void save(const char* what);
  void snapshot();
  void evaluate_averages(StepMetrics& metrics);
  void settle_averages();
  void stop_if_not_finite(const FinishedAverage* damaged);
  void write(const FinishedAverage& average) const;
  void stop_if_diverged(const RunPosition& at, double grad_norm);
  TrainSummary summary() const;

  /// A step that the device was given and whose results were not yet collected.
  struct Launched {
    RunPosition at;  // after it
    double counted;  // targets, over all ranks
    double lr;
    std::size_t fetch;  // of the scalars
    std::chrono::steady_clock::time_point begin;
    std::optional<double> average_ms;  // that taking its weights held the host up
  };

  Config config_;
  Communicator& communicator_;
  TrainerOptions options_;
  LlamaConfig model_;
  Dataset data_;
  std::optional<Dataset> valid_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> device_communicator_;  // sums tensors of the device; null where the host's can
  MemoryChoice memory_;
  BatchShape micro_;  // one micro-batch of this rank
  TrainPlan train_;
  ModelWeights weights_;  // on the host: what files hold
  OptimizerStates states_;
  DeviceWeights device_weights_;
  DeviceStates device_states_;
  std::vector<std::int32_t> tokens_, targets_;  // the rank's share of a step, [micro-batches * tokens]
  ModelInputs inputs_;
  Executor executor_;
  std::unique_ptr<Replay> replay_;
  std::unique_ptr<Evaluator> evaluator_;
  std::unique_ptr<Averages> averages_;  // null where none are configured
  std::unique_ptr<Outputs> outputs_;
  RunPosition at_;                  // of the last step launched
  std::vector<Launched> launched_;  // oldest first, at most two
  std::chrono::steady_clock::time_point collected_{};
  double peak_flops_per_s_ = 0;
  double train_loss_ = 0;
  std::optional<double> valid_loss_;
  std::optional<LossSpike> spike_;     // asked on the first rank alone
  std::optional<RescueEvent> rescue_;  // that the run goes on from; until its next step's metrics are written
};

/// The model that a configuration describes: its preset with what it overrides.
LlamaConfig model_config(const Config& config);
OptimizerOptions optimizer_options(const Config& config);
/// The same run with another member of the family. An alpha of another meaning, and states that only one of the two can
/// have, go back to the member's own.
Config with_optimizer(Config config, OptimizerKind kind);
/// Sequences of one rank's micro-batch: the configured one, or with `auto` the largest divisor of the rank's share that
/// holds at most 2048 tokens on the CPU, 2^26 / C on a GPU. A usage Error when the ranks do not divide the batch, or
/// the micro-batch the share.
BatchShape micro_batch(const Config& config, int ranks, const Backend& backend = cpu_backend());
/// Threads of one rank: run.threads, else OMP_NUM_THREADS, else the processors that this process may use, shared out
/// between the ranks of the machine.
int rank_threads(const Config& config);

}  // namespace kiln

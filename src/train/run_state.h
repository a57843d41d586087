#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>

#include "base/json.h"
#include "model/llama.h"
#include "report/metrics.h"
#include "train/run_position.h"
#include "train/train_plan.h"

namespace kiln {

class Averages;

/// What a checkpoint holds, borrowed from the trainer.
struct RunState {
  const ModelWeights& weights;
  const OptimizerStates& states;
  Json config;                      // the full configuration, for the reader and for the check on resume
  std::filesystem::path tokenizer;  // copied beside the model; may be empty
  Averages* averages = nullptr;     // under way; null where the run keeps none
};

/// Writes `RUN/step_XXXXXXXX/` atomically: model, optimizer states, averages, state.json, manifest. One rank calls it.
void save_checkpoint(const std::filesystem::path& directory, const RunState& state, const RunPosition& at);

/// Writes a snapshot: the model alone, in `dtype`, with its step and tokens; of an average, also `merge` as merge.json.
void save_snapshot(const std::filesystem::path& directory, const RunState& state, const RunPosition& at, DType dtype,
                   const Json& merge = nullptr);

/// Fills weights, states and averages from a checkpoint and says where it stands. A data Error names the file and
/// tensor when the checkpoint is torn, or belongs to another model, optimizer or configuration of states.
RunPosition load_checkpoint(const std::filesystem::path& directory, const RunState& state);

/// What a checkpoint that a rescue made says of it (`rescued_from` of its state.json); nothing for any other. A data
/// Error for a damaged one.
std::optional<RescueEvent> rescue_of(const std::filesystem::path& checkpoint);

/// Fills states from a directory that holds some, as a merge with `optimizer_state: keep-last` does, for a run that
/// starts from its weights; false when it holds none. Bias correction counts from the new run's first step and not from
/// theirs, so that Adam's first updates are the smaller, by sqrt(1-b2^t)/(1-b1^t): a warm-up of its own.
/// A data Error as load_checkpoint's.
bool load_states(const std::filesystem::path& directory, const OptimizerStates& states);

}  // namespace kiln

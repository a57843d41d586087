#pragma once
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/checkpoint.h"
#include "merge/average.h"

namespace kiln {

/// What becomes of the optimizer's states in a merge ("PMA-init", arXiv:2505.12082).
enum class OptimizerStateMerge {
  reset,      ///< left out: who starts from the merge starts with empty states
  keep_last,  ///< the newest checkpoint's, as they are
  average,    ///< averaged with the weights of the model
};

/// Whether states of different steps have no mean: moments in the basis of a projector, or in random ones that are
/// drawn anew and not stored (APOLLO: a limiter's norm without a projector), quantised ones, and factors of LoRA.
bool lack_a_mean(const SafetensorsReader& states);

/// "reset", "keep-last", "average"; a usage Error lists what exists.
std::string_view to_string(OptimizerStateMerge merge);
OptimizerStateMerge parse_optimizer_state_merge(std::string_view name);

/// Optimizer files of the inputs, opened and checked.
struct OptimizerFiles {
  struct File {
    std::string name;                                        // "optimizer-00000-of-00001.safetensors"
    std::filesystem::path source;                            // keep_last: copied as it is
    std::vector<std::unique_ptr<SafetensorsReader>> inputs;  // average: oldest first
  };
  std::vector<File> files;
};

/// Opens what `merge` needs; nothing with `reset`. `newest` is one of `inputs`.
/// error  usage: averaging with a negative weight, which could make a second moment negative
///        data: a checkpoint without states, states of other names, shapes or dtypes, or that are not f32, f64, bf16 or
///        f16; a low-rank projector that was refreshed between the checkpoints, so that moments have no common basis;
///        factors of LoRA; moments in random bases (APOLLO)
OptimizerFiles open_optimizer_files(const std::vector<MergeInput>& inputs, const MergeInput& newest,
                                    std::span<const double> weights, OptimizerStateMerge merge);

/// Writes them into a checkpoint under construction; averages as write_averages does, each in its own dtype.
void write_optimizer_files(CheckpointWriter& writer, const OptimizerFiles& files, std::span<const double> weights,
                           std::size_t piece_elements);

}  // namespace kiln

#pragma once
#include <memory>
#include <span>
#include <vector>

#include "merge/inputs.h"
#include "model/llama.h"

namespace kiln {

/// The weighted average of checkpoints, oldest first, as weights in memory: the same bits as merge_checkpoints writes
/// in fp32. For sweeps, which evaluate many merges and keep none. Memory beside the target: a piece of each input a
/// thread. error  data: a parameter of the target that a checkpoint lacks or holds in another shape, or an average that
/// is not
///        finite
void merge_into(std::span<const MergeInput* const> inputs, std::span<const double> weights, const ModelWeights& target);

}  // namespace kiln

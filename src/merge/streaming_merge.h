#pragma once
#include <filesystem>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "merge/inputs.h"
#include "merge/merge_report.h"
#include "merge/optimizer_merge.h"
#include "merge/weights.h"

namespace kiln {

/// The dtype of the merged tensors. fp32 by default: a bf16 merge loses a good part of what averaging gains. `same`: of
/// each tensor in the newest checkpoint.
enum class MergeDtype { fp32, bf16, fp16, same };

/// "fp32", "bf16", "same"; a usage Error lists what exists.
MergeDtype parse_merge_dtype(std::string_view name);
std::string_view to_string(MergeDtype dtype);

struct MergeOptions {
  std::vector<std::filesystem::path> inputs;  // checkpoint directories
  std::filesystem::path output;
  WeightOptions weights;
  MergeDtype dtype = MergeDtype::fp32;
  bool verify = true;  // hashes, by manifest or for merge.json; sizes are always checked
  OptimizerStateMerge optimizer_state = OptimizerStateMerge::reset;
  std::uint64_t max_shard_bytes = 0;                  // of tensors in one model file; 0: a single file
  bool keep_order = false;                            // the order given is oldest first, whatever the steps say
  std::size_t chunk_elements = std::size_t{1} << 19;  // of one thread
  Json state = Json::object();                        // keys that replace those of the newest state.json
  bool dry_run = false;                               // verify, report, and write nothing
};

/// Writes the weighted average of checkpoints as one checkpoint: model.safetensors (or shards with
/// model.safetensors.index.json, whose tensors have the same bytes), config.json and tokenizer files of
/// the newest, its state.json with `merged_from`, optimizer states as asked for, merge.json (inputs with hashes, steps
/// and tokens; weights; implied decay) and a manifest. With optimizer states a run can resume from it.
///
/// Everything is verified before a byte is written (open_inputs). Tensors are then streamed in chunks: y = sum_i w_i
/// x_i is accumulated in fp64, oldest first, and rounded once, to nearest even (average.h). Memory: for each
/// thread a part of a chunk of output, and about 100 MiB of inputs mapped. The result depends on neither chunk size,
/// threads nor processor.
///
/// error  usage: options, an output that exists and is no merge; data: inputs that are torn, mixed or not finite;
///        resource: disk full. Nothing is left at `output` then, and an older merge there still stands.
///
/// A dry run does all that comes before the first byte, hashes of manifests included, finds a disk too full, and
/// reports the files that it would write. It reads no weights of inputs without a manifest, so that one which is not
/// finite is found by the merge alone.
MergeReport merge_checkpoints(const MergeOptions& options);

/// Sorting, unless the order is to be kept; but custom weights belong to the checkpoints in the order given.
OutOfOrder order_policy(const MergeOptions& options);

}  // namespace kiln

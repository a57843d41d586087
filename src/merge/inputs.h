#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "io/safetensors.h"

namespace kiln {

/// The model tensors of one checkpoint directory, over one file or the shards of an index. Memory-mapped.
/// A data Error for a torn file, a tensor held twice, or one that the index promises and its shard lacks.
class ModelTensors {
 public:
  struct Source {
    const SafetensorsReader* file = nullptr;
    const SafetensorEntry* entry = nullptr;
  };
  explicit ModelTensors(const std::filesystem::path& directory);

  /// By name.
  const std::map<std::string, Source>& all() const { return tensors_; }
  const std::vector<std::unique_ptr<SafetensorsReader>>& files() const { return files_; }

 private:
  std::vector<std::unique_ptr<SafetensorsReader>> files_;
  std::map<std::string, Source> tensors_;
};

/// One file of an input as merge.json records it.
struct InputFile {
  std::string name;
  std::uint64_t bytes = 0;
  std::string hash;  // XXH3; empty where no manifest records it and it was not computed
};

/// A checkpoint that is about to be merged: whole, opened, and not yet read.
struct MergeInput {
  std::filesystem::path directory;
  std::optional<std::int64_t> step, tokens;
  std::vector<InputFile> files;
  Json config, state;  // state is null where there is no state.json
  std::unique_ptr<ModelTensors> model;
};

/// What to do with checkpoints that were not given oldest first.
enum class OutOfOrder { sort_and_warn, refuse, keep };

/// The step of a checkpoint: `step` of state.json, `global_step` of trainer_state.json, or the number in a name such
/// as step_00001000 or checkpoint-1000.
std::optional<std::int64_t> step_of(const std::filesystem::path& directory);

/// Oldest first by step, stable. When a step is unknown the order given stands, with a warning.
/// A usage Error with `refuse` when the order given is another one.
std::vector<std::filesystem::path> order_checkpoints(std::vector<std::filesystem::path> directories, OutOfOrder policy);

/// Checkpoints stay; a run's directory becomes its whole checkpoints (those of RUN/snapshots where that exists),
/// oldest first. A data Error for a path that is neither.
std::vector<std::filesystem::path> expand_checkpoints(const std::vector<std::filesystem::path>& paths);

/// Every `every`-th, counted back from the newest, and of those the newest `last` (0: all).
std::vector<std::filesystem::path> select_checkpoints(const std::vector<std::filesystem::path>& oldest_first,
                                                      std::size_t last, std::size_t every);

/// Which hashes open_inputs computes: those that manifests record, to compare; of all files, also where none is
/// recorded.
enum class Hashes { none, recorded, all };

/// Opens checkpoints and verifies them: distinct, whole (sizes by manifest, and hashes as asked for), and equal in
/// tensor names, shapes and configuration. Dtypes may differ (f32, f64, bf16, f16). A data Error names the tensor or
/// key, and the file.
std::vector<MergeInput> open_inputs(const std::vector<std::filesystem::path>& directories, Hashes hashes);

}  // namespace kiln

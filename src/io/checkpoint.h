#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace kiln {

/// A checkpoint directory under construction: files are written into `FINAL.tmp-PID`, and `commit()` writes
/// MANIFEST.json (sizes and XXH3 hashes of every file) last, fsyncs files and directory, and renames. A directory
/// without a valid manifest does not exist for resume. Dropped without commit, it removes what it wrote.
class CheckpointWriter {
 public:
  explicit CheckpointWriter(std::filesystem::path final_directory);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  /// Where to write files.
  const std::filesystem::path& directory() const { return temporary_; }
  void write_json(const std::string& name, const Json& value);
  void copy_file(const std::filesystem::path& source, const std::string& name);
  /// An existing final directory is replaced only after the new one is complete.
  void commit();

 private:
  std::filesystem::path final_, temporary_;
  bool committed_ = false;
};

enum class ManifestCheck { sizes, hashes };

/// Empty when `directory` holds a manifest and every file it names has the recorded size (and hash), else what is
/// wrong.
std::optional<std::string> checkpoint_fault(const std::filesystem::path& directory, ManifestCheck check);

/// `step_00001000`, and the step of such a name (nothing for another name).
std::string checkpoint_name(std::int64_t step);
std::optional<std::int64_t> checkpoint_step(const std::filesystem::path& directory);

/// Checkpoints `RUN/step_*` that are whole by size, ascending in step; torn ones are left out, with a warning.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& run_directory);

/// Removes all but the newest `keep` checkpoints; never the newest whole one. keep <= 0 keeps all.
void prune_checkpoints(const std::filesystem::path& run_directory, int keep);

/// Removes every `step_*` below `directory` of a step behind `step`, torn ones too, and returns their paths, ascending.
/// None where there is no such directory.
std::vector<std::filesystem::path> remove_checkpoints_after(const std::filesystem::path& directory, std::int64_t step);

/// The model files of a Hugging Face directory: `model.safetensors`, or the shards of `model.safetensors.index.json`.
/// A data Error when there is none or a shard is missing.
std::vector<std::filesystem::path> model_files(const std::filesystem::path& directory);

}  // namespace kiln

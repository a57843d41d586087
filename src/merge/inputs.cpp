#include "merge/inputs.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>

#include "base/error.h"
#include "base/log.h"
#include "core/parallel.h"
#include "io/checkpoint.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

constexpr const char* kIndexName = "model.safetensors.index.json";

// Keys of config.json that may differ between checkpoints of one run without changing the model.
constexpr std::array<std::string_view, 5> kFreeConfigKeys{"dtype", "torch_dtype", "transformers_version",
                                                          "_name_or_path", "use_cache"};

bool is_checkpoint(const fs::path& directory) {
  return fs::exists(directory / "model.safetensors") || fs::exists(directory / kIndexName);
}

/// "a/b/" and "a/b" alike give "b".
std::string last_name(const fs::path& directory) {
  return (directory.has_filename() ? directory : directory.parent_path()).filename().string();
}

std::optional<std::int64_t> integer_at(const fs::path& file, const char* key) {
  if (!fs::exists(file)) return std::nullopt;
  const Json json = read_json(file);
  const auto found = json.find(key);
  if (found == json.end() || !found->is_number_integer()) return std::nullopt;
  return found->get<std::int64_t>();
}

/// 1000 of "checkpoint-1000" and of "step1000-tokens4B".
std::optional<std::int64_t> step_in_name(const std::string& name) {
  for (const std::string_view word : {"checkpoint", "step"}) {
    std::size_t at = name.find(word);
    if (at == std::string::npos) continue;
    at += word.size();
    if (at < name.size() && (name[at] == '-' || name[at] == '_')) ++at;
    std::int64_t step = 0;
    if (std::from_chars(name.data() + at, name.data() + name.size(), step).ec == std::errc{} && step >= 0) return step;
  }
  return std::nullopt;
}

std::string shape_text(const std::vector<std::int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ",")); }

/// The tensors that the index promises must be in the shards that it names.
void check_index(const fs::path& directory, const std::map<std::string, ModelTensors::Source>& tensors) {
  const fs::path index = directory / kIndexName;
  const Json json = read_json(index);
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object())
    fail(ExitCode::data, "{}: has no weight_map; save the model again", index.string());
  for (const auto& [name, shard] : map->items()) {
    const auto found = tensors.find(name);
    if (found == tensors.end() || found->second.file->path().filename() != shard.get<std::string>())
      fail(ExitCode::data, "{}: tensor '{}' is not in {} as the index says; copy the directory again", index.string(),
           name, shard.get<std::string>());
  }
}

void check_dtypes(const ModelTensors& model) {
  for (const auto& [name, source] : model.all()) {
    const DType dtype = source.entry->dtype;
    if (dtype != DType::f32 && dtype != DType::f64 && dtype != DType::bf16 && dtype != DType::f16)
      fail(ExitCode::data, "{}: tensor '{}' is {}; only f32, f64, bf16 and f16 can be averaged",
           source.file->path().string(), name, to_string(dtype));
  }
}

void check_same_tensors(const ModelTensors& first, const ModelTensors& other, const fs::path& other_directory) {
  const std::string reference = first.files().front()->path().string();
  for (const auto& [name, source] : first.all()) {
    const auto found = other.all().find(name);
    if (found == other.all().end())
      fail(ExitCode::data, "{}: tensor '{}' is missing, and {} has it; merge checkpoints of one run",
           (other.files().size() == 1 ? other.files().front()->path() : other_directory).string(), name,
           source.file->path().string());
    const SafetensorEntry &a = *source.entry, &b = *found->second.entry;
    if (a.shape != b.shape)
      fail(ExitCode::data, "{}: tensor '{}' has the shape {}, expected {} as in {}; merge checkpoints of one run",
           found->second.file->path().string(), name, shape_text(b.shape), shape_text(a.shape),
           source.file->path().string());
  }
  for (const auto& [name, source] : other.all())
    if (!first.all().contains(name))
      fail(ExitCode::data, "{}: tensor '{}' is not in {}; merge checkpoints of one run", source.file->path().string(),
           name, reference);
}

void check_same_config(const MergeInput& first, const MergeInput& other) {
  for (const auto& [key, value] : first.config.items()) {
    const bool free = std::find(kFreeConfigKeys.begin(), kFreeConfigKeys.end(), key) != kFreeConfigKeys.end();
    const auto found = other.config.find(key);
    if (free || found == other.config.end() || *found == value) continue;
    fail(ExitCode::data, "{}: {} is {}, expected {} as in {}; merge checkpoints of one model",
         (other.directory / "config.json").string(), key, found->dump(), value.dump(),
         (first.directory / "config.json").string());
  }
}

void check_sizes(const fs::path& directory) {
  if (!fs::exists(directory / "MANIFEST.json")) {
    // Only kiln writes state.json, and it writes the manifest last.
    if (fs::exists(directory / "state.json"))
      fail(ExitCode::data, "{}: has state.json but no MANIFEST.json, so it was torn while written; leave it out",
           directory.string());
    return;
  }
  if (const auto fault = checkpoint_fault(directory, ManifestCheck::sizes))
    fail(ExitCode::data, "{}: not a whole checkpoint: {}; leave it out or copy it again", directory.string(), *fault);
}

void check_distinct(const std::vector<fs::path>& directories) {
  std::map<fs::path, fs::path> seen;
  for (const fs::path& directory : directories) {
    if (!fs::is_directory(directory))
      fail(ExitCode::data, "{}: is not a directory; give checkpoint directories", directory.string());
    const auto [at, added] = seen.emplace(fs::canonical(directory), directory);
    check(added, "{}: given twice (also as {}); give each checkpoint once", directory.string(), at->second.string());
  }
}

/// A file of an input, with the hash that its manifest records (empty without one) and the one found.
struct FileCheck {
  MergeInput* input;
  std::string name, recorded, found, fault;
};

/// Every file of the manifest, or the model's files where there is none.
std::vector<FileCheck> files_to_check(MergeInput& input) {
  std::vector<FileCheck> checks;
  const fs::path manifest = input.directory / "MANIFEST.json";
  if (fs::exists(manifest)) {
    const Json json = read_json(manifest);
    for (const auto& [name, file] : json.at("files").items())
      checks.push_back({&input, name, file.at("xxh3").get<std::string>(), "", ""});
  } else {
    for (const InputFile& file : input.files) checks.push_back({&input, file.name, "", "", ""});
  }
  return checks;
}

/// Hashes files on all threads; what goes wrong is noted in the check.
void hash_files(std::vector<FileCheck>& checks) {
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next.fetch_add(1); i < checks.size(); i = next.fetch_add(1)) {
      FileCheck& check = checks[i];
      try {
        check.found = hash_file(check.input->directory / check.name);
        if (!check.recorded.empty() && check.found != check.recorded)
          check.fault = fmt::format("{} does not match its hash", check.name);
      } catch (const std::exception& e) {
        check.fault = e.what();
      }
    }
  };
  parallel_for(thread_count(), 1, [&](std::int64_t, std::int64_t) { work(); });
}

/// Records the model files' hashes; those asked for, and of a manifest all, are computed and compared.
void record_hashes(std::vector<MergeInput>& inputs, Hashes hashes) {
  std::vector<FileCheck> checks;
  for (MergeInput& input : inputs)
    for (FileCheck& check : files_to_check(input)) checks.push_back(std::move(check));
  if (hashes == Hashes::recorded) std::erase_if(checks, [](const FileCheck& check) { return check.recorded.empty(); });
  if (hashes != Hashes::none) hash_files(checks);
  for (const FileCheck& check : checks) {
    if (!check.fault.empty())
      fail(ExitCode::data, "{}: not a whole checkpoint: {}; leave it out or copy it again",
           check.input->directory.string(), check.fault);
    for (InputFile& file : check.input->files)
      if (file.name == check.name) file.hash = check.recorded.empty() ? check.found : check.recorded;
  }
}

MergeInput open_input(const fs::path& directory) {
  check_sizes(directory);
  MergeInput input;
  input.directory = directory;
  input.step = step_of(directory);
  input.tokens = integer_at(directory / "state.json", "tokens");
  input.config = read_json(directory / "config.json");
  if (fs::exists(directory / "state.json")) input.state = read_json(directory / "state.json");
  input.model = std::make_unique<ModelTensors>(directory);
  check_dtypes(*input.model);
  for (const auto& file : input.model->files())
    input.files.push_back({file->path().filename().string(), fs::file_size(file->path()), ""});
  return input;
}

}  // namespace

ModelTensors::ModelTensors(const fs::path& directory) {
  for (const fs::path& path : model_files(directory)) files_.push_back(std::make_unique<SafetensorsReader>(path));
  for (const auto& file : files_)
    for (const SafetensorEntry& entry : file->entries()) {
      const auto [at, added] = tensors_.emplace(entry.name, Source{file.get(), &entry});
      if (!added)
        fail(ExitCode::data, "{}: tensor '{}' is also in {}; save the model again", file->path().string(), entry.name,
             at->second.file->path().string());
    }
  if (tensors_.empty()) fail(ExitCode::data, "{}: holds no tensor; save the model again", directory.string());
  if (files_.front()->path().filename() != "model.safetensors") check_index(directory, tensors_);
}

std::optional<std::int64_t> step_of(const fs::path& directory) {
  if (const auto step = integer_at(directory / "state.json", "step")) return step;
  if (const auto step = integer_at(directory / "trainer_state.json", "global_step")) return step;
  return step_in_name(last_name(directory));
}

std::vector<fs::path> order_checkpoints(std::vector<fs::path> directories, OutOfOrder policy) {
  if (policy == OutOfOrder::keep || directories.size() < 2) return directories;
  std::vector<std::pair<std::int64_t, fs::path>> stepped;
  for (const fs::path& directory : directories) {
    const auto step = step_of(directory);
    if (!step) {
      log_warning("{}: its step is unknown, so the order given is taken as oldest first", directory.string());
      return directories;
    }
    stepped.emplace_back(*step, directory);
  }
  const auto older = [](const auto& a, const auto& b) { return a.first < b.first; };
  if (std::is_sorted(stepped.begin(), stepped.end(), older)) return directories;
  check(policy != OutOfOrder::refuse,
        "checkpoints are not given oldest first by step, so the weights would fall on others; sort them, or keep the "
        "order with --keep-order");
  log_warning("checkpoints are sorted oldest first by step; --keep-order keeps the order given");
  std::stable_sort(stepped.begin(), stepped.end(), older);
  for (std::size_t i = 0; i < stepped.size(); ++i) directories[i] = stepped[i].second;
  return directories;
}

std::vector<fs::path> expand_checkpoints(const std::vector<fs::path>& paths) {
  std::vector<fs::path> directories;
  for (const fs::path& path : paths) {
    if (is_checkpoint(path)) {
      directories.push_back(path);
      continue;
    }
    const fs::path run = fs::is_directory(path / "snapshots") ? path / "snapshots" : path;
    const auto found = fs::is_directory(run) ? list_checkpoints(run) : std::vector<fs::path>{};
    if (found.empty())
      fail(ExitCode::data,
           "{}: neither a checkpoint (no model.safetensors) nor a directory with whole step_* checkpoints; check the "
           "path",
           path.string());
    directories.insert(directories.end(), found.begin(), found.end());
  }
  return directories;
}

std::vector<fs::path> select_checkpoints(const std::vector<fs::path>& oldest_first, std::size_t last,
                                         std::size_t every) {
  check(every >= 1, "every is 0; give 1 or more");
  std::vector<fs::path> chosen;
  for (std::size_t back = 0; back < oldest_first.size() && (last == 0 || chosen.size() < last); back += every)
    chosen.push_back(oldest_first[oldest_first.size() - 1 - back]);
  std::reverse(chosen.begin(), chosen.end());
  return chosen;
}

std::vector<MergeInput> open_inputs(const std::vector<fs::path>& directories, Hashes hashes) {
  check(!directories.empty(), "no checkpoint to merge; give at least one");
  check_distinct(directories);
  std::vector<MergeInput> inputs;
  for (const fs::path& directory : directories) {
    inputs.push_back(open_input(directory));
    check_same_tensors(*inputs.front().model, *inputs.back().model, directory);
    check_same_config(inputs.front(), inputs.back());
  }
  record_hashes(inputs, hashes);
  return inputs;
}

}  // namespace kiln

#include "io/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

constexpr int kManifestVersion = 1;
constexpr std::string_view kPrefix = "step_";

/// Temporaries that writers of `final_directory` left when they died.
void remove_leftovers(const fs::path& final_directory) {
  const std::string prefix = final_directory.filename().string() + ".tmp-";
  const fs::path parent = final_directory.has_parent_path() ? final_directory.parent_path() : fs::path(".");
  if (!fs::is_directory(parent)) return;
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(parent))
    if (entry.path().filename().string().starts_with(prefix)) found.push_back(entry.path());
  for (const fs::path& path : found) fs::remove_all(path);
}

/// Renamed first: what a kill leaves half-removed is then no checkpoint.
void remove_checkpoint(const fs::path& path) {
  const fs::path doomed = path.string() + ".tmp-old";
  fs::remove_all(doomed);  // of a kill before
  fs::rename(path, doomed);
  fs::remove_all(doomed);
}

}  // namespace

CheckpointWriter::CheckpointWriter(fs::path final_directory) : final_(std::move(final_directory)) {
  if (!final_.has_filename()) final_ = final_.parent_path();  // "run/step_1/" names the directory itself
  temporary_ = fmt::format("{}.tmp-{}", final_.string(), ::getpid());
  try {
    remove_leftovers(final_);
    fs::create_directories(temporary_);
  } catch (const fs::filesystem_error& e) {
    fail(ExitCode::data, "{}: cannot be created ({}); check the path and its permissions", temporary_.string(),
         e.code().message());
  }
}

CheckpointWriter::~CheckpointWriter() {
  if (committed_) return;
  std::error_code ignored;  // a destructor must not throw; what stays is removed by the next writer
  fs::remove_all(temporary_, ignored);
}

void CheckpointWriter::write_json(const std::string& name, const Json& value) {
  write_text_atomic(temporary_ / name, value.dump(2) + "\n");
}

void CheckpointWriter::copy_file(const fs::path& source, const std::string& name) {
  if (!fs::is_regular_file(source)) fail(ExitCode::data, "{}: no such file; check the path", source.string());
  fs::copy_file(source, temporary_ / name, fs::copy_options::overwrite_existing);
  sync_path(temporary_ / name);
}

void CheckpointWriter::commit() {
  Json files = Json::object();
  std::set<fs::path> paths;
  for (const fs::directory_entry& entry : fs::directory_iterator(temporary_)) paths.insert(entry.path());
  for (const fs::path& path : paths)
    files[path.filename().string()] = {{"bytes", fs::file_size(path)}, {"xxh3", hash_file(path)}};
  write_json("MANIFEST.json", {{"version", kManifestVersion}, {"files", files}});
  sync_path(temporary_);

  const fs::path parent = final_.has_parent_path() ? final_.parent_path() : fs::path(".");
  if (fs::exists(final_)) {
    // One exchange, so that a kill at any moment leaves the old directory or the new one under the final name.
    if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, final_.c_str(), RENAME_EXCHANGE) != 0)
      fail(ExitCode::data, "{}: cannot be replaced ({}); remove it first", final_.string(), std::strerror(errno));
  } else {
    fs::rename(temporary_, final_);
  }
  committed_ = true;
  sync_path(parent);
  fs::remove_all(temporary_);  // what was exchanged out
}

std::optional<std::string> checkpoint_fault(const fs::path& directory, ManifestCheck check) {
  const fs::path manifest = directory / "MANIFEST.json";
  if (!fs::is_regular_file(manifest)) return "MANIFEST.json is missing";
  try {
    const Json json = read_json(manifest);
    if (json.at("version").get<int>() != kManifestVersion) return "MANIFEST.json has another version";
    for (const auto& [name, file] : json.at("files").items()) {
      const fs::path path = directory / name;
      const auto bytes = file.at("bytes").get<std::uint64_t>();
      if (!fs::is_regular_file(path)) return fmt::format("{} is missing", name);
      if (fs::file_size(path) != bytes)
        return fmt::format("{} has {} bytes, expected {}", name, fs::file_size(path), bytes);
      if (check == ManifestCheck::hashes && hash_file(path) != file.at("xxh3").get<std::string>())
        return fmt::format("{} does not match its hash", name);
    }
  } catch (const std::exception& e) {
    return fmt::format("MANIFEST.json cannot be read: {}", e.what());
  }
  return std::nullopt;
}

std::string checkpoint_name(std::int64_t step) { return fmt::format("{}{:08}", kPrefix, step); }

std::optional<std::int64_t> checkpoint_step(const fs::path& directory) {
  const std::string name = directory.filename().string();
  if (!name.starts_with(kPrefix) || name.size() < kPrefix.size() + 8) return std::nullopt;
  std::int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (parsed.ec != std::errc{} || parsed.ptr != end) return std::nullopt;
  return step;
}

std::vector<fs::path> list_checkpoints(const fs::path& run_directory) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  if (!fs::is_directory(run_directory)) return {};
  for (const fs::directory_entry& entry : fs::directory_iterator(run_directory)) {
    const std::optional<std::int64_t> step = checkpoint_step(entry.path());
    if (!step || !entry.is_directory()) continue;
    if (const auto fault = checkpoint_fault(entry.path(), ManifestCheck::sizes)) {
      log_warning("{}: left out, {}", entry.path().string(), *fault);
      continue;
    }
    found.emplace_back(*step, entry.path());
  }
  std::sort(found.begin(), found.end());
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

void prune_checkpoints(const fs::path& run_directory, int keep) {
  if (keep <= 0) return;
  const std::vector<fs::path> found = list_checkpoints(run_directory);
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep) < found.size(); ++i) remove_checkpoint(found[i]);
}

std::vector<fs::path> remove_checkpoints_after(const fs::path& directory, std::int64_t step) {
  if (!fs::is_directory(directory)) return {};
  std::vector<std::pair<std::int64_t, fs::path>> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory))
    if (const auto at = checkpoint_step(entry.path()); at && *at > step && entry.is_directory())
      found.emplace_back(*at, entry.path());
  std::sort(found.begin(), found.end());
  std::vector<fs::path> removed;
  for (auto& [at, path] : found) {
    remove_checkpoint(path);
    removed.push_back(std::move(path));
  }
  return removed;
}

std::vector<fs::path> model_files(const fs::path& directory) {
  const fs::path single = directory / "model.safetensors", index = directory / "model.safetensors.index.json";
  if (fs::is_regular_file(single)) return {single};
  if (!fs::is_regular_file(index))
    fail(ExitCode::data, "{}: holds neither model.safetensors nor model.safetensors.index.json; give a model directory",
         directory.string());
  std::set<fs::path> files;
  try {
    const Json json = read_json(index);
    for (const auto& [tensor, file] : json.at("weight_map").items()) files.insert(directory / file.get<std::string>());
  } catch (const nlohmann::json::exception& e) {
    fail(ExitCode::data, "{}: no valid weight_map ({})", index.string(), e.what());
  }
  for (const fs::path& file : files)
    if (!fs::is_regular_file(file))
      fail(ExitCode::data, "{}: missing, but {} names it; copy the directory again", file.string(), index.string());
  return {files.begin(), files.end()};
}

}  // namespace kiln

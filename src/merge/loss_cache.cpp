#include "merge/loss_cache.h"

#include <unistd.h>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "io/safetensors.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

constexpr int kVersion = 1;

fs::path file_of(const fs::path& directory, const std::string& key) {
  return directory / (hash_bytes(std::as_bytes(std::span(key))) + ".safetensors");
}

template <typename T>
std::vector<T> read_all(const SafetensorsReader& file, const char* name, DType dtype) {
  const SafetensorEntry* entry = file.find(name);
  if (entry == nullptr || entry->dtype != dtype) fail(ExitCode::data, "tensor '{}' is missing", name);
  std::vector<T> values((entry->end - entry->begin) / sizeof(T));
  file.read_bytes(*entry, 0, std::as_writable_bytes(std::span(values)));
  return values;
}

std::string hash_of(const SequenceLosses& losses) {
  return hash_bytes(std::as_bytes(std::span(losses.nats))) + hash_bytes(std::as_bytes(std::span(losses.targets)));
}

SequenceLosses read_losses(const fs::path& path, const std::string& key) {
  const SafetensorsReader file(path);
  const auto metadata = [&](const char* name) {
    const auto found = file.metadata().find(name);
    return found == file.metadata().end() ? std::string() : found->second;
  };
  if (metadata("key") != key) fail(ExitCode::data, "it holds losses of something else");
  SequenceLosses losses{.nats = read_all<double>(file, "nats", DType::f64),
                        .targets = read_all<std::int64_t>(file, "targets", DType::i64)};
  if (losses.nats.empty() || losses.nats.size() != losses.targets.size() || metadata("xxh3") != hash_of(losses))
    fail(ExitCode::data, "the losses do not match their hash");
  return losses;
}

}  // namespace

LossCache::LossCache(fs::path directory, Json held_out)
    : directory_(std::move(directory)), held_out_(std::move(held_out)) {}

Json LossCache::key(std::span<const MergeInput* const> inputs, std::span<const double> weights) const {
  Json json{{"version", kVersion}, {"held_out", held_out_}, {"weights", weights}, {"inputs", Json::array()}};
  for (const MergeInput* input : inputs) {
    Json files = Json::array();
    for (const InputFile& file : input->files) {
      check(!file.hash.empty(), "LossCache: {} was opened without verification", input->directory.string());
      files.push_back(file.hash);
    }
    json["inputs"].push_back(files);
  }
  return json;
}

std::optional<SequenceLosses> LossCache::find(std::span<const MergeInput* const> inputs,
                                              std::span<const double> weights) const {
  const std::string wanted = key(inputs, weights).dump();
  const fs::path path = file_of(directory_, wanted);
  if (!fs::exists(path)) return std::nullopt;
  try {
    return read_losses(path, wanted);
  } catch (const Error& e) {
    log_warning("{}: left out, {}; the merge is evaluated again", path.string(), e.what());
    return std::nullopt;
  }
}

void LossCache::store(std::span<const MergeInput* const> inputs, std::span<const double> weights,
                      const SequenceLosses& losses) const {
  const std::string text = key(inputs, weights).dump();
  const fs::path path = file_of(directory_, text), temporary = fmt::format("{}.{}.tmp", path.string(), ::getpid());
  fs::create_directories(directory_);
  const auto count = static_cast<std::int64_t>(losses.nats.size());
  SafetensorsWriter out(temporary, {{"nats", DType::f64, {count}}, {"targets", DType::i64, {count}}},
                        {{"format", "pt"}, {"key", text}, {"xxh3", hash_of(losses)}});
  out.append(std::as_bytes(std::span(losses.nats)));  // by name, of one size
  out.append(std::as_bytes(std::span(losses.targets)));
  out.finish();
  fs::rename(temporary, path);
}

}  // namespace kiln

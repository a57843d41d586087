#include "train/run_state.h"

#include <algorithm>

#include "io/checkpoint.h"
#include "io/safetensors.h"
#include "train/averages.h"
#include "train/model_files.h"

namespace kiln {
namespace {

constexpr int kStateVersion = 1;
// Every rank holds the same states, so there is one file, whatever the number of ranks.
constexpr const char* kOptimizerFile = "optimizer-00000-of-00001.safetensors";

Json position_json(const RunState& state, const RunPosition& at) {
  return {{"version", kStateVersion},     {"step", at.step},       {"tokens", at.tokens},
          {"data_position", at.position}, {"rescues", at.rescues}, {"config", state.config}};
}

void write_states(const std::filesystem::path& path, const OptimizerStates& states) {
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, Tensor> by_name;
  states.visit([&](const std::string& name, const Tensor& tensor) {
    items.push_back({name, tensor.dtype(), tensor.shape().sizes()});
    by_name[name] = tensor;
  });
  SafetensorsWriter out(path, items);
  for (const SafetensorsWriter::Item& item : out.layout()) {
    const Tensor& tensor = by_name.at(item.name);
    out.append({static_cast<const std::byte*>(tensor.data), tensor.bytes()});
  }
  out.finish();
}

void read_states(const std::filesystem::path& path, const OptimizerStates& states) {
  const SafetensorsReader file(path);
  std::size_t count = 0;
  states.visit([&](const std::string& name, const Tensor& tensor) {
    const SafetensorEntry* entry = file.find(name);
    if (entry == nullptr || entry->dtype != tensor.dtype() || entry->shape != tensor.shape().sizes())
      fail(ExitCode::data, "{}: optimizer state '{}' {}; resume with the configuration that wrote it, or --resume none",
           path.string(), name,
           entry == nullptr
               ? std::string("is missing")
               : fmt::format("has shape [{}], expected {}", fmt::join(entry->shape, ","), tensor.shape().str()));
    const std::span<const std::byte> bytes = file.bytes(*entry);
    std::copy(bytes.begin(), bytes.end(), static_cast<std::byte*>(tensor.data));
    ++count;
  });
  if (count != file.entries().size())
    fail(ExitCode::data, "{}: holds {} optimizer states, expected {}; it was written with another optimizer",
         path.string(), file.entries().size(), count);
}

}  // namespace

void save_checkpoint(const std::filesystem::path& directory, const RunState& state, const RunPosition& at) {
  CheckpointWriter writer(directory);
  write_model(writer, state.weights, DType::f32, state.tokenizer);
  write_states(writer.directory() / kOptimizerFile, state.states);
  if (state.averages != nullptr) state.averages->save(writer.directory());
  writer.write_json("state.json", position_json(state, at));
  writer.commit();
}

void save_snapshot(const std::filesystem::path& directory, const RunState& state, const RunPosition& at, DType dtype,
                   const Json& merge) {
  CheckpointWriter writer(directory);
  write_model(writer, state.weights, dtype, state.tokenizer);
  writer.write_json("state.json", position_json(state, at));
  if (!merge.is_null()) writer.write_json("merge.json", merge);
  writer.commit();
}

RunPosition load_checkpoint(const std::filesystem::path& directory, const RunState& state) {
  if (const auto fault = checkpoint_fault(directory, ManifestCheck::hashes))
    fail(ExitCode::data, "{}: the checkpoint is torn ({}); resume from another one", directory.string(), *fault);
  const std::filesystem::path path = directory / "state.json";
  const Json json = read_json(path);
  RunPosition at;
  try {
    if (json.at("version").get<int>() != kStateVersion)
      fail(ExitCode::data, "{}: version {}, expected {}", path.string(), json.at("version").dump(), kStateVersion);
    at = {.step = json.at("step"),
          .tokens = json.at("tokens"),
          .position = json.at("data_position"),
          .rescues = json.value("rescues", std::int64_t{0})};
  } catch (const nlohmann::json::exception& e) {
    fail(ExitCode::data, "{}: not a run's state ({}); resume from a checkpoint that kiln wrote", path.string(),
         e.what());
  }
  const LlamaConfig saved = from_hf_config(read_json(directory / "config.json"), (directory / "config.json").string());
  check(saved.parameter_count() == state.weights.config().parameter_count(),
        "{}: the checkpoint's model has {} parameters, the configuration's {}; resume with the same model",
        directory.string(), saved.parameter_count(), state.weights.config().parameter_count());
  load_weights(directory, state.weights);
  read_states(directory / kOptimizerFile, state.states);
  if (state.averages != nullptr) state.averages->load(directory);
  return at;
}

std::optional<RescueEvent> rescue_of(const std::filesystem::path& checkpoint) {
  const std::filesystem::path path = checkpoint / "state.json";
  const Json json = read_json(path);
  const auto found = json.find("rescued_from");
  if (found == json.end()) return std::nullopt;
  try {
    return rescue_event(*found);
  } catch (const nlohmann::json::exception& e) {
    fail(ExitCode::data, "{}: no valid rescued_from ({}); resume from another checkpoint", path.string(), e.what());
  }
}

bool load_states(const std::filesystem::path& directory, const OptimizerStates& states) {
  if (!std::filesystem::exists(directory / kOptimizerFile)) return false;
  read_states(directory / kOptimizerFile, states);
  return true;
}

}  // namespace kiln

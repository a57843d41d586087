#include "merge/streaming_merge.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "base/error.h"
#include "base/files.h"
#include "io/checkpoint.h"
#include "merge/input_hashes.h"
#include "merge/model_shards.h"
#include "merge/write_averages.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

/// Seconds since it was made.
class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// What transformers keeps beside the weights, and the SentencePiece model.
constexpr std::array<const char*, 9> kCopiedFiles{"tokenizer.model",
                                                  "tokenizer.json",
                                                  "tokenizer_config.json",
                                                  "special_tokens_map.json",
                                                  "added_tokens.json",
                                                  "chat_template.jinja",
                                                  "vocab.json",
                                                  "merges.txt",
                                                  "generation_config.json"};

constexpr const char* kIndexName = "model.safetensors.index.json";

/// In config.json; not of `same`, which leaves it.
std::string_view transformers_name(MergeDtype dtype) {
  return dtype == MergeDtype::bf16 ? "bfloat16" : dtype == MergeDtype::fp16 ? "float16" : "float32";
}

DType output_dtype(MergeDtype wanted, DType input) {
  switch (wanted) {
    case MergeDtype::fp32:
      return DType::f32;
    case MergeDtype::bf16:
      return DType::bf16;
    case MergeDtype::fp16:
      return DType::f16;
    case MergeDtype::same:
      return input;
  }
  fail(ExitCode::usage, "unknown merge dtype {}", static_cast<int>(wanted));
}

/// The newest by step, and of equals the last.
const MergeInput& newest(const std::vector<MergeInput>& inputs) {
  const MergeInput* best = &inputs.front();
  for (const MergeInput& input : inputs)
    if (input.step.value_or(-1) >= best->step.value_or(-1)) best = &input;
  return *best;
}

std::vector<SafetensorsWriter::Item> output_items(const ModelTensors& model, MergeDtype dtype) {
  std::vector<SafetensorsWriter::Item> items;
  for (const auto& [name, source] : model.all())
    items.push_back({name, output_dtype(dtype, source.entry->dtype), source.entry->shape});
  return items;
}

/// Files whose hash no manifest records are hashed for merge.json: while they are averaged, where their order allows
/// it.
void hash_on_the_way(std::vector<MergeInput>& inputs, const std::vector<SafetensorsWriter::Item>& layout,
                     InputHashes& hashes) {
  for (MergeInput& input : inputs)
    for (std::size_t i = 0; i < input.files.size(); ++i) {
      const SafetensorsReader& file = *input.model->files()[i];
      if (input.files[i].hash.empty() && !hashes.follow(file, layout)) input.files[i].hash = hash_file(file.path());
    }
}

/// The files of the merged model, and what each tensor is averaged from.
struct ModelPlan {
  std::vector<ModelShard> shards;
  std::map<std::string, Sources> sources;
};

/// Counts tensors and bytes for the report.
ModelPlan plan_model(const std::vector<MergeInput>& inputs, const MergeOptions& options, MergeReport& report) {
  ModelPlan plan{.shards = model_shards(output_items(*newest(inputs).model, options.dtype), options.max_shard_bytes),
                 .sources = {}};
  for (const ModelShard& shard : plan.shards)
    for (const SafetensorsWriter::Item& item : shard.items) {
      Sources& tensor = plan.sources[item.name];
      for (const MergeInput& input : inputs) tensor.push_back(input.model->all().at(item.name));
      const SafetensorEntry& entry = *tensor.front().entry;
      const std::uint64_t elements = (entry.end - entry.begin) / size_of(entry.dtype);
      report.tensors += 1;
      report.elements += elements;
      for (const ModelTensors::Source& source : tensor) report.bytes_read += source.entry->end - source.entry->begin;
      report.bytes_written += elements * size_of(item.dtype);
    }
  return plan;
}

void write_model(CheckpointWriter& checkpoint, std::vector<MergeInput>& inputs, std::span<const double> weights,
                 const ModelPlan& plan, const MergeOptions& options, MergeReport& report) {
  const Stopwatch watch;
  std::vector<std::unique_ptr<SafetensorsWriter>> writers;  // all at first, so that a full disk is found out first
  std::vector<SafetensorsWriter::Item> layout;
  for (const ModelShard& shard : plan.shards) {
    writers.push_back(std::make_unique<SafetensorsWriter>(checkpoint.directory() / shard.file, shard.items));
    layout.insert(layout.end(), shard.items.begin(), shard.items.end());
  }
  InputHashes hashes;
  if (options.verify) hash_on_the_way(inputs, layout, hashes);
  for (const auto& writer : writers) {
    FileSink sink(*writer);
    write_averages(sink, plan.sources, weights, options.chunk_elements, &hashes);
  }
  for (MergeInput& input : inputs)
    for (std::size_t i = 0; i < input.files.size() && options.verify; ++i)
      if (input.files[i].hash.empty()) input.files[i].hash = hashes.digest(*input.model->files()[i]);
  report.average_seconds = watch.seconds();
  for (const auto& writer : writers) writer->finish();
  if (writers.size() > 1) checkpoint.write_json(kIndexName, shard_index(plan.shards));
}

/// Tokenizer and generation files that stand beside the newest checkpoint.
std::vector<std::string> copied_files(const MergeInput& last) {
  std::vector<std::string> names;
  for (const char* name : kCopiedFiles)
    if (fs::exists(last.directory / name)) names.emplace_back(name);
  return names;
}

/// All that the output will hold, in the order of writing.
std::vector<std::string> output_files(const ModelPlan& plan, const OptimizerFiles& states, const MergeInput& last) {
  std::vector<std::string> names;
  for (const ModelShard& shard : plan.shards) names.push_back(shard.file);
  if (plan.shards.size() > 1) names.emplace_back(kIndexName);
  for (const OptimizerFiles::File& file : states.files) names.push_back(file.name);
  names.emplace_back("config.json");
  for (std::string& name : copied_files(last)) names.push_back(std::move(name));
  if (!last.state.is_null()) names.emplace_back("state.json");
  names.insert(names.end(), {"merge.json", "MANIFEST.json"});
  return names;
}

std::uint64_t bytes_of(const OptimizerFiles& states) {
  std::uint64_t total = 0;
  for (const OptimizerFiles::File& file : states.files)
    total += fs::file_size(file.source.empty() ? file.inputs.back()->path() : file.source);
  return total;
}

/// What the writers would find out first.
void check_space(const fs::path& output, std::uint64_t bytes) {
  fs::path home = fs::absolute(output).parent_path();
  while (!fs::exists(home)) home = home.parent_path();
  const fs::space_info disk = fs::space(home);  // without capacity: no place for files, such as /proc
  if (!fs::is_directory(home) || ::access(home.c_str(), W_OK) != 0 || disk.capacity == 0)
    fail(ExitCode::data, "{}: cannot be created in {}; choose another --out", output.string(), home.string());
  if (disk.available < bytes)
    fail(ExitCode::resource, "{}: {} bytes of tensors do not fit on the disk, which has {} free; free some space",
         output.string(), bytes, disk.available);
}

Json method_json(const WeightOptions& options) {
  Json json = {{"method", to_string(options.method)}};
  const bool ema = options.method == MergeMethod::ema || options.method == MergeMethod::ema_closed;
  if (ema) json["alpha"] = options.alpha;
  if (options.method == MergeMethod::ema_closed || options.method == MergeMethod::custom)
    json["normalise"] = options.normalise;
  const bool decays = options.method == MergeMethod::schedule || options.method == MergeMethod::qam;
  if (decays && options.decay.empty()) {
    json["shape"] = to_string(options.shape);
    json["final_ratio"] = options.final_ratio;
  }
  return json;
}

Json provenance(const std::vector<MergeInput>& inputs, const MergeOptions& options, const MergeReport& report) {
  Json json = method_json(options.weights);
  json["dtype"] = to_string(options.dtype);
  json["optimizer_state"] = to_string(options.optimizer_state);
  json["verified"] = options.verify;
  json["checkpoints"] = Json::array();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Json files = Json::array();
    for (const InputFile& file : inputs[i].files)
      files.push_back(
          {{"name", file.name}, {"bytes", file.bytes}, {"xxh3", file.hash.empty() ? Json(nullptr) : Json(file.hash)}});
    json["checkpoints"].push_back(to_json(report.checkpoints[i]));
    json["checkpoints"].back()["files"] = files;
  }
  return json;
}

void write_side_files(CheckpointWriter& writer, const std::vector<MergeInput>& inputs, const MergeOptions& options,
                      const MergeReport& report) {
  const MergeInput& last = newest(inputs);
  Json config = last.config;
  if (options.dtype != MergeDtype::same)
    for (const char* key : {"dtype", "torch_dtype"}) config[key] = transformers_name(options.dtype);
  writer.write_json("config.json", config);
  for (const std::string& name : copied_files(last)) writer.copy_file(last.directory / name, name);
  if (!last.state.is_null()) {
    Json state = last.state;
    state.erase("rescued_from");  // of the input's own run
    state["merged_from"] = Json::array();
    for (const MergeInput& input : inputs) state["merged_from"].push_back(input.directory.string());
    state.update(options.state);
    writer.write_json("state.json", state);
  }
  writer.write_json("merge.json", provenance(inputs, options, report));
}

/// `out/` and `out` alike; refuses to replace anything but an earlier merge, and any input.
fs::path checked_output(const MergeOptions& options, const std::vector<fs::path>& inputs) {
  check(!options.output.empty(), "no output directory; give --out DIR");
  const fs::path output = options.output.has_filename() ? options.output : options.output.parent_path();
  if (!fs::exists(output)) return output;
  std::error_code missing;  // an input that does not exist is named by open_inputs
  for (const fs::path& input : inputs)
    check(!fs::equivalent(output, input, missing), "{}: is both input and output; choose another --out",
          output.string());
  check(fs::is_directory(output) && (fs::is_empty(output) || fs::exists(output / "merge.json")),
        "{}: exists and is no earlier merge; choose another --out or remove it", output.string());
  return output;
}

MergeReport plan_report(const std::vector<MergeInput>& inputs, std::span<const double> weights, bool verify) {
  MergeReport report;
  for (const MergeInput& input : inputs)
    for (const InputFile& file : input.files) {
      report.input_files += 1;
      report.verified_files += verify && !file.hash.empty() ? 1 : 0;
    }
  const std::vector<double> decay = implied_decay(weights);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    MergedCheckpoint row{inputs[i].directory, inputs[i].step, inputs[i].tokens, weights[i], std::nullopt};
    if (i > 0 && !decay.empty()) row.decay = decay[i - 1];
    report.checkpoints.push_back(row);
  }
  return report;
}

}  // namespace

std::string_view to_string(MergeDtype dtype) {
  switch (dtype) {
    case MergeDtype::fp32:
      return "fp32";
    case MergeDtype::bf16:
      return "bf16";
    case MergeDtype::fp16:
      return "fp16";
    case MergeDtype::same:
      return "same";
  }
  return "unknown";
}

MergeDtype parse_merge_dtype(std::string_view name) {
  for (const MergeDtype dtype : {MergeDtype::fp32, MergeDtype::bf16, MergeDtype::fp16, MergeDtype::same})
    if (to_string(dtype) == name) return dtype;
  fail(ExitCode::usage, "dtype '{}' does not exist for a merge; use one of fp32, bf16, fp16, same", name);
}

OutOfOrder order_policy(const MergeOptions& options) {
  if (options.keep_order) return OutOfOrder::keep;
  return options.weights.method == MergeMethod::custom ? OutOfOrder::refuse : OutOfOrder::sort_and_warn;
}

MergeReport merge_checkpoints(const MergeOptions& options) {
  const Stopwatch watch;
  check(options.chunk_elements > 0, "chunk_elements is 0; give 1 or more");
  const std::vector<fs::path> directories = order_checkpoints(options.inputs, order_policy(options));
  const std::vector<double> weights = merge_weights(options.weights, directories.size());
  const fs::path output = checked_output(options, directories);
  std::vector<MergeInput> inputs = open_inputs(directories, options.verify ? Hashes::recorded : Hashes::none);
  const OptimizerFiles states = open_optimizer_files(inputs, newest(inputs), weights, options.optimizer_state);
  MergeReport report = plan_report(inputs, weights, options.verify);
  const ModelPlan plan = plan_model(inputs, options, report);
  report.output = output;
  report.files = output_files(plan, states, newest(inputs));
  report.open_seconds = watch.seconds();
  if (options.dry_run) {
    check_space(output, report.bytes_written + bytes_of(states));
    report.dry_run = true;
    report.seconds = watch.seconds();
    return report;
  }

  CheckpointWriter writer(output);
  write_model(writer, inputs, weights, plan, options, report);
  write_optimizer_files(writer, states, weights, options.chunk_elements);
  write_side_files(writer, inputs, options, report);
  writer.commit();
  report.seconds = watch.seconds();
  return report;
}

}  // namespace kiln

#include "merge/streaming_merge.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "io/checkpoint.h"
#include "merge/inputs.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

// Elements that a thread sums at a time: two fp64 blocks stay in its first-level cache.
constexpr std::size_t kBlock = 2048;

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

/// fp64 to fp32, rounded to odd: a second rounding to 22 bits or fewer then equals one rounding of the fp64
/// (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums").
float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value)) return nearest;
  auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;  // towards zero
  return std::bit_cast<float>(bits | 1u);
}

template <typename T>
T round_to(double value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return round_to_bfloat16(value);
  else if constexpr (std::is_same_v<T, float16>)
    return round_to_float16(value);
  else
    return static_cast<T>(value);
}

bool is_finite(float value) { return std::isfinite(value); }
bool is_finite(double value) { return std::isfinite(value); }
bool is_finite(bfloat16 value) { return std::isfinite(to_float(value)); }
bool is_finite(float16 value) { return std::isfinite(to_float(value)); }

/// The switch from an output dtype to its storage type.
template <typename F>
decltype(auto) visit_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<bfloat16>();
    case DType::f16:
      return f.template operator()<float16>();
    default:
      break;
  }
  fail(ExitCode::usage, "a merge cannot be written as {}; use fp32 or bf16", to_string(dtype));
}

/// One tensor in every input.
using Sources = std::vector<ModelTensors::Source>;

/// out[k] = round(sum_i w_i x_i[first + k]); false when a result is not finite. At most kBlock elements.
template <typename T>
bool average_block(const Sources& sources, std::span<const double> weights, std::uint64_t first, std::span<T> out) {
  std::array<double, kBlock> sum, x;
  std::fill_n(sum.begin(), out.size(), 0.0);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    sources[i].file->read_floats(*sources[i].entry, first, std::span<double>(x.data(), out.size()));
    for (std::size_t k = 0; k < out.size(); ++k) sum[k] += weights[i] * x[k];
  }
  bool finite = true;
  for (std::size_t k = 0; k < out.size(); ++k) {
    out[k] = round_to<T>(sum[k]);
    finite = finite && is_finite(out[k]);
  }
  return finite;
}

/// average_block over a chunk, on all threads. The sum of one element never depends on the split.
template <typename T>
bool average_chunk(const Sources& sources, std::span<const double> weights, std::uint64_t first, std::span<T> out) {
  std::atomic<bool> finite = true;
  parallel_for(static_cast<std::int64_t>(out.size()), kBlock, [&](std::int64_t begin, std::int64_t end) {
    for (auto at = static_cast<std::size_t>(begin); at < static_cast<std::size_t>(end); at += kBlock) {
      const std::size_t count = std::min(kBlock, static_cast<std::size_t>(end) - at);
      if (!average_block(sources, weights, first + at, out.subspan(at, count))) finite = false;
    }
  });
  return finite;
}

/// Says which input made elements [first, first + count) of the average infinite or NaN.
[[noreturn]] void fail_not_finite(const Sources& sources, std::uint64_t first, std::size_t count, DType out) {
  std::vector<double> x(count);
  for (const ModelTensors::Source& source : sources) {
    source.file->read_floats(*source.entry, first, std::span<double>(x));
    const auto bad = std::find_if(x.begin(), x.end(), [](double value) { return !std::isfinite(value); });
    if (bad == x.end()) continue;
    fail(ExitCode::data, "{}: tensor '{}' holds {} at element {}, and finite weights are expected; leave it out",
         source.file->path().string(), source.entry->name, *bad, first + static_cast<std::uint64_t>(bad - x.begin()));
  }
  fail(ExitCode::data, "the average of tensor '{}' overflows {} in elements {} to {}; choose a wider --dtype",
       sources.front().entry->name, to_string(out), first, first + count - 1);
}

DType output_dtype(MergeDtype wanted, DType input) {
  switch (wanted) {
    case MergeDtype::fp32:
      return DType::f32;
    case MergeDtype::bf16:
      return DType::bf16;
    case MergeDtype::same:
      return input;
  }
  fail(ExitCode::usage, "unknown merge dtype {}", static_cast<int>(wanted));
}

std::vector<SafetensorsWriter::Item> output_items(const ModelTensors& model, MergeDtype dtype) {
  std::vector<SafetensorsWriter::Item> items;
  for (const auto& [name, source] : model.all())
    items.push_back({name, output_dtype(dtype, source.entry->dtype), source.entry->shape});
  return items;
}

void average_tensor(const SafetensorsWriter::Item& item, const Sources& sources, std::span<const double> weights,
                    const Buffer& chunk, std::size_t chunk_elements, SafetensorsWriter& writer) {
  std::uint64_t elements = 1;
  for (const std::int64_t size : item.shape) elements *= static_cast<std::uint64_t>(size);
  for (std::uint64_t first = 0; first < elements; first += chunk_elements) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(chunk_elements, elements - first));
    const bool finite = visit_storage(item.dtype, [&]<typename T>() {
      return average_chunk(sources, weights, first, std::span<T>(reinterpret_cast<T*>(chunk.data()), count));
    });
    if (!finite) fail_not_finite(sources, first, count, item.dtype);
    writer.append({chunk.data(), count * size_of(item.dtype)});
  }
}

void write_model(const fs::path& path, const std::vector<MergeInput>& inputs, std::span<const double> weights,
                 const MergeOptions& options, MergeReport& report) {
  SafetensorsWriter writer(path, output_items(*inputs.front().model, options.dtype));
  const Buffer chunk(options.chunk_elements * sizeof(double), "chunk of the merge");
  for (const SafetensorsWriter::Item& item : writer.layout()) {
    Sources sources;
    for (const MergeInput& input : inputs) sources.push_back(input.model->all().at(item.name));
    average_tensor(item, sources, weights, chunk, options.chunk_elements, writer);
    const SafetensorEntry& entry = *sources.front().entry;
    const std::uint64_t elements = (entry.end - entry.begin) / size_of(entry.dtype);
    report.tensors += 1;
    report.elements += elements;
    report.bytes_read += (entry.end - entry.begin) * inputs.size();
    report.bytes_written += elements * size_of(item.dtype);
  }
  writer.finish();
}

Json method_json(const WeightOptions& options) {
  Json json = {{"method", to_string(options.method)}};
  const bool ema = options.method == MergeMethod::ema || options.method == MergeMethod::ema_closed;
  if (ema) json["alpha"] = options.alpha;
  if (options.method == MergeMethod::ema_closed || options.method == MergeMethod::custom)
    json["normalise"] = options.normalise;
  if (options.method == MergeMethod::schedule && options.decay.empty()) {
    json["shape"] = to_string(options.shape);
    json["final_ratio"] = options.final_ratio;
  }
  return json;
}

Json provenance(const std::vector<MergeInput>& inputs, const MergeOptions& options, const MergeReport& report) {
  Json json = method_json(options.weights);
  json["dtype"] = options.dtype == MergeDtype::same ? "same" : options.dtype == MergeDtype::bf16 ? "bf16" : "fp32";
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

/// The newest by step, and of equals the last.
const MergeInput& newest(const std::vector<MergeInput>& inputs) {
  const MergeInput* best = &inputs.front();
  for (const MergeInput& input : inputs)
    if (input.step.value_or(-1) >= best->step.value_or(-1)) best = &input;
  return *best;
}

void write_side_files(CheckpointWriter& writer, const std::vector<MergeInput>& inputs, const MergeOptions& options,
                      const MergeReport& report) {
  const MergeInput& last = newest(inputs);
  Json config = last.config;
  if (options.dtype != MergeDtype::same)
    for (const char* key : {"dtype", "torch_dtype"})
      config[key] = options.dtype == MergeDtype::bf16 ? "bfloat16" : "float32";
  writer.write_json("config.json", config);
  for (const char* name : kCopiedFiles)
    if (fs::exists(last.directory / name)) writer.copy_file(last.directory / name, name);
  if (!last.state.is_null()) {
    Json state = last.state;
    state["merged_from"] = Json::array();
    for (const MergeInput& input : inputs) state["merged_from"].push_back(input.directory.string());
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

MergeReport plan_report(const std::vector<MergeInput>& inputs, std::span<const double> weights) {
  MergeReport report;
  const std::vector<double> decay = is_decay(weights) ? decay_of_weights(weights) : std::vector<double>{};
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    MergedCheckpoint row{inputs[i].directory, inputs[i].step, inputs[i].tokens, weights[i], std::nullopt};
    if (i > 0 && !decay.empty()) row.decay = decay[i - 1];
    report.checkpoints.push_back(row);
  }
  return report;
}

}  // namespace

MergeDtype parse_merge_dtype(std::string_view name) {
  if (name == "fp32") return MergeDtype::fp32;
  if (name == "bf16") return MergeDtype::bf16;
  if (name == "same") return MergeDtype::same;
  fail(ExitCode::usage, "dtype '{}' does not exist for a merge; use one of fp32, bf16, same", name);
}

bfloat16 round_to_bfloat16(double value) { return to_bfloat16(round_to_odd(value)); }
float16 round_to_float16(double value) { return to_float16(round_to_odd(value)); }

OutOfOrder order_policy(const MergeOptions& options) {
  if (options.keep_order) return OutOfOrder::keep;
  return options.weights.method == MergeMethod::custom ? OutOfOrder::refuse : OutOfOrder::sort_and_warn;
}

MergeReport merge_checkpoints(const MergeOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  check(options.chunk_elements > 0, "chunk_elements is 0; give 1 or more");
  const std::vector<fs::path> directories = order_checkpoints(options.inputs, order_policy(options));
  const std::vector<double> weights = merge_weights(options.weights, directories.size());
  const fs::path output = checked_output(options, directories);
  const std::vector<MergeInput> inputs = open_inputs(directories, options.verify);
  MergeReport report = plan_report(inputs, weights);

  CheckpointWriter writer(output);
  write_model(writer.directory() / "model.safetensors", inputs, weights, options, report);
  write_side_files(writer, inputs, options, report);
  writer.commit();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace kiln

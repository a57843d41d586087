#pragma once
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "base/rng.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "io/safetensors.h"

namespace kiln {

namespace fs = std::filesystem;

/// A directory of its own for each test, removed at its end.
class TempDirectory {
 public:
  TempDirectory() {
    static int count = 0;
    path_ = fs::temp_directory_path() / fmt::format("kiln_merge_{}_{}", ::getpid(), count++);
    fs::create_directories(path_);
  }
  ~TempDirectory() { fs::remove_all(path_); }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// A tensor as a test writes it: values are rounded to `dtype` (f64, f32, bf16, f16).
struct TestTensor {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::vector<double> values;
};
using TestModel = std::map<std::string, TestTensor>;

inline std::vector<std::byte> to_storage(const TestTensor& tensor) {
  std::vector<std::byte> bytes(tensor.values.size() * size_of(tensor.dtype));
  auto put = [&](std::size_t i, auto value) { std::memcpy(bytes.data() + i * sizeof(value), &value, sizeof(value)); };
  for (std::size_t i = 0; i < tensor.values.size(); ++i) {
    const double value = tensor.values[i];
    if (tensor.dtype == DType::f64) put(i, value);
    if (tensor.dtype == DType::f32) put(i, static_cast<float>(value));
    if (tensor.dtype == DType::bf16) put(i, to_bfloat16(static_cast<float>(value)));
    if (tensor.dtype == DType::f16) put(i, to_float16(static_cast<float>(value)));
  }
  return bytes;
}

inline void write_safetensors(const fs::path& path, const TestModel& model) {
  std::vector<SafetensorsWriter::Item> items;
  for (const auto& [name, tensor] : model) items.push_back({name, tensor.dtype, tensor.shape});
  SafetensorsWriter writer(path, items);
  for (const auto& item : writer.layout()) writer.append(to_storage(model.at(item.name)));
  writer.finish();
}

inline Json test_config() {
  return {
      {"architectures", {"LlamaForCausalLM"}}, {"hidden_size", 8}, {"dtype", "float32"}, {"torch_dtype", "float32"}};
}

/// A kiln checkpoint with state.json, a tokenizer file and a manifest.
inline void write_checkpoint(const fs::path& directory, const TestModel& model, std::int64_t step) {
  CheckpointWriter writer(directory);
  write_safetensors(writer.directory() / "model.safetensors", model);
  writer.write_json("config.json", test_config());
  writer.write_json("state.json", {{"step", step}, {"tokens", step * 1000}, {"seed", 7}});
  std::ofstream(writer.directory() / "tokenizer.model") << "pieces of step " << step;
  writer.commit();
}

/// A directory as transformers saves it: no manifest, no state.
inline void write_hf_directory(const fs::path& directory, const TestModel& model) {
  fs::create_directories(directory);
  write_safetensors(directory / "model.safetensors", model);
  write_text_atomic(directory / "config.json", test_config().dump());
}

/// The same over two shards and an index.
inline void write_sharded_directory(const fs::path& directory, const TestModel& model) {
  fs::create_directories(directory);
  TestModel shards[2];
  Json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", Json::object()}};
  std::size_t i = 0;
  for (const auto& [name, tensor] : model) {
    const std::size_t shard = i++ % 2;
    shards[shard][name] = tensor;
    index["weight_map"][name] = fmt::format("model-0000{}-of-00002.safetensors", shard + 1);
  }
  for (std::size_t shard = 0; shard < 2; ++shard)
    write_safetensors(directory / fmt::format("model-0000{}-of-00002.safetensors", shard + 1), shards[shard]);
  write_text_atomic(directory / "model.safetensors.index.json", index.dump());
  write_text_atomic(directory / "config.json", test_config().dump());
}

inline std::vector<double> random_values(std::size_t count, std::uint64_t stream) {
  const Philox random(11, stream);
  std::vector<double> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = 0.02 * random.normal(i);
  return values;
}

/// Three tensors of odd sizes; draws differ by `stream`.
inline TestModel random_model(DType dtype, std::uint64_t stream) {
  return {{"lm_head.weight", {dtype, {37, 129}, random_values(37 * 129, stream * 3)}},
          {"model.embed_tokens.weight", {dtype, {41, 101}, random_values(41 * 101, stream * 3 + 1)}},
          {"model.norm.weight", {dtype, {5}, random_values(5, stream * 3 + 2)}}};
}

/// A tensor's values as fp64, straight from the file.
inline std::vector<double> read_values(const fs::path& directory, const std::string& name) {
  const SafetensorsReader reader(directory / "model.safetensors");
  const SafetensorEntry* entry = reader.find(name);
  REQUIRE(entry != nullptr);
  std::vector<double> values((entry->end - entry->begin) / size_of(entry->dtype));
  reader.read_floats(*entry, 0, std::span<double>(values));
  return values;
}

/// Nothing but `expected` in a directory: no output and no temporary file was left.
inline void check_only(const fs::path& directory, std::vector<std::string> expected) {
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(directory)) found.push_back(entry.path().filename().string());
  std::sort(found.begin(), found.end());
  std::sort(expected.begin(), expected.end());
  CHECK(found == expected);
}

}  // namespace kiln

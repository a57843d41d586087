#include "train/model_files.h"

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "base/files.h"
#include "catch.h"
#include "io/safetensors.h"
#include "train/model_convert.h"

using namespace kiln;

namespace {

namespace fs = std::filesystem;

struct TempDir {
  TempDir() {
    static std::atomic<int> next{0};
    path = fs::temp_directory_path() / fmt::format("kiln_model_files_{}_{}", ::getpid(), next++);
    fs::create_directories(path);
  }
  ~TempDir() { fs::remove_all(path); }
  fs::path path;
};

LlamaConfig small_model() {
  LlamaConfig config;
  config.vocab = 50;
  config.hidden = 24;
  config.ffn = 40;
  config.heads = 4;
  config.kv_heads = 2;
  config.layers = 2;
  config.head_dim = 6;
  config.max_positions = 64;
  config.rope_base = 5e5;
  return config;
}

ModelWeights random_weights(const LlamaConfig& config = small_model()) {
  ModelWeights weights(config, DType::f32);
  initialise(weights, 11);
  return weights;
}

void save(const fs::path& directory, const ModelWeights& weights, DType dtype = DType::f32) {
  CheckpointWriter writer(directory);
  write_model(writer, weights, dtype, {});
  writer.commit();
}

bool bitwise_equal(const ModelWeights& a, const ModelWeights& b) {
  if (a.config() != b.config()) return false;
  for (std::size_t s = 0; s < a.table().storages.size(); ++s)
    if (std::memcmp(a.storage(s).data, b.storage(s).data, a.storage(s).bytes()) != 0) return false;
  return true;
}

/// One tensor of a file to be made for a test.
struct StoredTensor {
  SafetensorsWriter::Item item;
  std::vector<std::byte> bytes;
};
using StoredModel = std::map<std::string, StoredTensor>;

StoredModel read_stored(const fs::path& file) {
  StoredModel model;
  const SafetensorsReader reader(file);
  for (const SafetensorEntry& entry : reader.entries()) {
    const std::span<const std::byte> bytes = reader.bytes(entry);
    model[entry.name] = {{entry.name, entry.dtype, entry.shape}, {bytes.begin(), bytes.end()}};
  }
  return model;
}

void write_stored(const fs::path& file, const StoredModel& model) {
  std::vector<SafetensorsWriter::Item> items;
  for (const auto& [name, tensor] : model) items.push_back(tensor.item);
  SafetensorsWriter out(file, items);
  for (const SafetensorsWriter::Item& item : out.layout()) out.append(model.at(item.name).bytes);
  out.finish();
}

/// A model directory without a manifest, as other programs leave it, for tests to damage.
struct PlainDirectory {
  PlainDirectory() : weights(random_weights()) {
    save(temp.path / "model", weights);
    fs::remove(path() / "MANIFEST.json");
    stored = read_stored(file());
    config = read_json(path() / "config.json");
  }
  fs::path path() const { return temp.path / "model"; }
  fs::path file() const { return path() / "model.safetensors"; }
  void rewrite() const {
    write_stored(file(), stored);
    write_text_atomic(path() / "config.json", config.dump());
  }

  TempDir temp;
  ModelWeights weights;
  StoredModel stored;
  Json config;
};

void require_error(const fs::path& directory, const std::string& text) {
  try {
    load_model(directory);
    FAIL("no error, expected: " << text);
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::data);
    CHECK_THAT(e.what(), ContainsSubstring(text));
  }
}

/// Every tensor of the stored files, as the reader of single tensors sees it, is in the model where its name says.
void require_same_as_files(const fs::path& directory) {
  const ModelWeights weights = load_model(directory);
  std::map<std::string, Tensor> views;
  for (const Parameter& parameter : weights.table().parameters) views[parameter.name] = weights.view(parameter);
  for (const fs::path& path : model_files(directory)) {
    const SafetensorsReader reader(path);
    for (const SafetensorEntry& entry : reader.entries()) {
      if (weights.config().tied && entry.name == "lm_head.weight") continue;
      CAPTURE(entry.name);
      const auto view = views.at(entry.name).span<float>();
      std::vector<float> expected(view.size());
      reader.read_floats(entry, 0, std::span<float>(expected));
      CHECK(std::equal(view.begin(), view.end(), expected.begin()));
      views.erase(entry.name);
    }
  }
  CHECK(views.empty());
}

}  // namespace

TEST_CASE("A saved model loads bit for bit", "[model_files]") {
  const TempDir temp;
  LlamaConfig config = small_model();
  config.tied = GENERATE(false, true);
  const ModelWeights weights = random_weights(config);
  save(temp.path / "model", weights);
  CHECK(bitwise_equal(load_model(temp.path / "model"), weights));

  ModelWeights other(config, DType::f32);
  load_weights(temp.path / "model", other);
  CHECK(bitwise_equal(other, weights));
}

TEST_CASE("The file holds Hugging Face names and shapes", "[model_files]") {
  const TempDir temp;
  save(temp.path / "model", random_weights());
  const SafetensorsReader file(temp.path / "model" / "model.safetensors");
  CHECK(file.entries().size() == 3 + 2 * 9);
  CHECK(file.find("model.layers.1.self_attn.q_proj.weight")->shape == std::vector<std::int64_t>{24, 24});
  CHECK(file.find("model.layers.1.self_attn.k_proj.weight")->shape == std::vector<std::int64_t>{12, 24});
  CHECK(file.find("model.layers.0.mlp.down_proj.weight")->shape == std::vector<std::int64_t>{24, 40});
  CHECK(file.find("lm_head.weight")->shape == std::vector<std::int64_t>{50, 24});
}

TEST_CASE("Shards load as one file does", "[model_files]") {
  const PlainDirectory from;
  fs::remove(from.file());
  StoredModel shards[2];
  Json map = Json::object();
  std::size_t n = 0;
  for (const auto& [name, tensor] : from.stored) {
    const std::size_t shard = n++ % 2;
    shards[shard][name] = tensor;
    map[name] = fmt::format("model-{:05}-of-00002.safetensors", shard + 1);
  }
  for (std::size_t s = 0; s < 2; ++s)
    write_stored(from.path() / fmt::format("model-{:05}-of-00002.safetensors", s + 1), shards[s]);
  write_text_atomic(from.path() / "model.safetensors.index.json",
                    Json{{"metadata", {{"total_size", 0}}}, {"weight_map", map}}.dump());
  CHECK(bitwise_equal(load_model(from.path()), from.weights));

  fs::remove(from.path() / "model-00002-of-00002.safetensors");
  require_error(from.path(), "model-00002-of-00002.safetensors");
}

TEST_CASE("f64, bf16 and f16 storage is converted", "[model_files]") {
  PlainDirectory from;
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  StoredTensor& tensor = from.stored.at(name);
  std::vector<float> values(tensor.bytes.size() / sizeof(float));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  const auto store = [&]<typename T>(const std::vector<T>& converted) {
    tensor.item.dtype = dtype_of<T>();
    const auto bytes = std::as_bytes(std::span(converted));
    tensor.bytes.assign(bytes.begin(), bytes.end());
    from.rewrite();
  };
  const auto loaded = [&] {
    const ModelWeights weights = load_model(from.path());
    for (const Parameter& parameter : weights.table().parameters)
      if (parameter.name == name) {
        const auto span = weights.view(parameter).span<float>();
        return std::vector<float>(span.begin(), span.end());
      }
    return std::vector<float>{};
  };
  store(std::vector<double>(values.begin(), values.end()));
  CHECK(loaded() == values);

  std::vector<bfloat16> brain;
  std::vector<float> rounded;
  for (const float value : values) brain.push_back(to_bfloat16(value));
  for (const bfloat16 value : brain) rounded.push_back(to_float(value));
  store(brain);
  CHECK(loaded() == rounded);

  std::vector<float16> half;
  rounded.clear();
  for (const float value : values) half.push_back(to_float16(value));
  for (const float16 value : half) rounded.push_back(to_float(value));
  store(half);
  CHECK(loaded() == rounded);
}

TEST_CASE("bf16 export rounds each weight to nearest", "[model_files]") {
  const TempDir temp;
  const ModelWeights weights = random_weights();
  weights.view(weights.table().parameters[0]).span<float>()[0] =
      0x1.01p0f;  // half-way between 1 and 1 + 2^-7: even is 1
  weights.view(weights.table().parameters[0]).span<float>()[1] = 0x1.03p0f;  // half-way: even is 1 + 2^-6
  save(temp.path / "model", weights, DType::bf16);
  CHECK(read_json(temp.path / "model" / "config.json").at("dtype") == "bfloat16");
  const ModelWeights loaded = load_model(temp.path / "model");
  CHECK(loaded.view(loaded.table().parameters[0]).span<float>()[0] == 1.0f);
  CHECK(loaded.view(loaded.table().parameters[0]).span<float>()[1] == 0x1.04p0f);
  std::int64_t changed = 0;
  for (std::size_t s = 0; s < weights.table().storages.size(); ++s) {
    const auto before = weights.storage(s).span<float>(), after = loaded.storage(s).span<float>();
    for (std::size_t i = 0; i < before.size(); ++i) {
      REQUIRE(after[i] == to_float(to_bfloat16(before[i])));
      REQUIRE(std::abs(after[i] - before[i]) <= std::abs(before[i]) * 0x1p-8f);
      changed += after[i] != before[i];
    }
  }
  CHECK(changed > 1000);
}

TEST_CASE("A tied model may store its head, and old exports their buffers", "[model_files]") {
  PlainDirectory from;
  from.config["tie_word_embeddings"] = true;
  const std::string buffer = "model.layers.0.self_attn.rotary_emb.inv_freq";
  from.stored[buffer] = {{buffer, DType::f32, {3}}, std::vector<std::byte>(12)};
  from.rewrite();
  CHECK(load_model(from.path()).config().tied);
}

TEST_CASE("Model directories that do not fit are refused by name", "[model_files]") {
  PlainDirectory from;
  const std::string name = "model.layers.1.mlp.gate_proj.weight";
  require_error(from.temp.path / "nowhere", "nowhere: no such model directory");

  SECTION("missing tensor") {
    from.stored.erase(name);
    from.rewrite();
    require_error(from.path(), "tensor 'model.layers.1.mlp.gate_proj.weight' is missing (1 in all)");
  }
  SECTION("unexpected tensor") {
    from.stored["model.layers.2.mlp.gate_proj.weight"] = from.stored.at(name);
    from.stored["model.layers.2.mlp.gate_proj.weight"].item.name = "model.layers.2.mlp.gate_proj.weight";
    from.rewrite();
    require_error(from.path(), "tensor 'model.layers.2.mlp.gate_proj.weight' is not part of the model");
  }
  SECTION("wrong shape") {
    from.stored.at(name).item.shape = {24, 40};
    from.rewrite();
    require_error(from.path(),
                  "model.safetensors: tensor 'model.layers.1.mlp.gate_proj.weight' has shape [24,40], "
                  "expected [40,24]");
  }
  SECTION("a dtype that is no float") {
    from.stored.at(name).item.dtype = DType::i32;
    from.rewrite();
    require_error(from.path(), name);
  }
  SECTION("missing key of config.json") {
    from.config.erase("num_hidden_layers");
    from.rewrite();
    require_error(from.path(), "config.json: key 'num_hidden_layers' is missing");
  }
  SECTION("another architecture") {
    from.config["architectures"] = {"MistralForCausalLM"};
    from.rewrite();
    require_error(from.path(), "MistralForCausalLM");
  }
  SECTION("sizes that do not fit together") {
    from.config["num_key_value_heads"] = 3;
    from.rewrite();
    require_error(from.path(), "kv_heads 3");
  }
  SECTION("no config.json") {
    fs::remove(from.path() / "config.json");
    require_error(from.path(), "config.json");
  }
  SECTION("no weights") {
    fs::remove(from.file());
    require_error(from.path(), "holds neither model.safetensors nor");
  }
  SECTION("torn file") {
    fs::resize_file(from.file(), fs::file_size(from.file()) - 100);
    require_error(from.path(), "model.safetensors");
  }
  SECTION("torn header") {
    fs::resize_file(from.file(), 40);
    require_error(from.path(), "model.safetensors");
  }
}

TEST_CASE("A checkpoint that does not match its manifest is refused", "[model_files]") {
  const TempDir temp;
  save(temp.path / "model", random_weights());
  fs::resize_file(temp.path / "model" / "model.safetensors", 1000);
  require_error(temp.path / "model", "the checkpoint is torn (model.safetensors has 1000 bytes");
}

TEST_CASE("Converted models carry their tokenizer and nothing else", "[model_files]") {
  const PlainDirectory from;
  write_text_atomic(from.path() / "tokenizer.json", "{}");
  write_text_atomic(from.path() / "optimizer-00000-of-00001.safetensors", "x");
  const fs::path out = from.temp.path / "imported", back = from.temp.path / "exported";
  const ConvertedModel converted = convert_model(from.path(), out, DType::f32);
  CHECK(converted.parameters == small_model().parameter_count());
  CHECK(converted.tokenizer_files == std::vector<std::string>{"tokenizer.json"});
  CHECK_FALSE(checkpoint_fault(out, ManifestCheck::hashes));
  CHECK_FALSE(fs::exists(out / "optimizer-00000-of-00001.safetensors"));
  convert_model(out, back, DType::f32);
  CHECK(bitwise_equal(load_model(back), from.weights));
  CHECK_THROWS_WITH(convert_model(from.path(), out, DType::f32), ContainsSubstring("not an empty directory"));
  CHECK(parse_weight_dtype("bf16", "--dtype") == DType::bf16);
  CHECK_THROWS_WITH(parse_weight_dtype("fp8", "--dtype"), ContainsSubstring("--dtype 'fp8': expected fp32 or bf16"));
}

TEST_CASE("Directories that transformers saved load", "[model_files]") {
  for (const char* name : {"llama_gqa", "llama_tied"}) {
    CAPTURE(name);
    const fs::path directory = fs::path(KILN_GOLDEN_DIR) / name;
    REQUIRE(fs::is_directory(directory));
    require_same_as_files(directory);
  }
}

#include <limits>

#include "merge/merge_request.h"
#include "merge/model_shards.h"
#include "merge/streaming_merge.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

/// Bytes of every tensor of a directory, by name, over all of its files.
std::map<std::string, std::vector<std::byte>> tensor_bytes(const fs::path& directory) {
  std::map<std::string, std::vector<std::byte>> all;
  const ModelTensors model(directory);
  for (const auto& [name, source] : model.all()) {
    const std::span<const std::byte> bytes = source.file->bytes(*source.entry);
    all[name].assign(bytes.begin(), bytes.end());
  }
  return all;
}

std::vector<std::string> names_of(const ModelShard& shard) {
  std::vector<std::string> names;
  for (const SafetensorsWriter::Item& item : shard.items) names.push_back(item.name);
  return names;
}

std::vector<fs::path> write_inputs(const TempDirectory& temp) {
  write_checkpoint(temp / "step_00000001", random_model(DType::f32, 1), 1);
  write_hf_directory(temp / "checkpoint-2", random_model(DType::f32, 2));
  write_sharded_directory(temp / "checkpoint-3", random_model(DType::f32, 3));
  return {temp / "step_00000001", temp / "checkpoint-2", temp / "checkpoint-3"};
}

using Names = std::vector<std::string>;

}  // namespace

TEST_CASE("tensors fill shards in the order of a single file, and a large one has its own") {
  const std::vector<SafetensorsWriter::Item> items{{"d", DType::bf16, {2, 4}},  // 16 bytes
                                                   {"a", DType::f32, {4}},      // 16
                                                   {"c", DType::f32, {3}},      // 12
                                                   {"b", DType::f32, {5, 5}},   // 100
                                                   {"e", DType::bf16, {}}};     // 2
  const std::vector<ModelShard> shards = model_shards(items, 30);
  REQUIRE(shards.size() == 3);
  CHECK(names_of(shards[0]) == Names{"a"});
  CHECK(names_of(shards[1]) == Names{"b"});
  CHECK(names_of(shards[2]) == Names{"c", "d", "e"});
  CHECK(shards[1].file == "model-00002-of-00003.safetensors");
  const Json index = shard_index(shards);
  CHECK(index["metadata"]["total_size"] == 146);
  CHECK(index["metadata"]["total_parameters"] == 41);
  CHECK(index["weight_map"]["d"] == "model-00003-of-00003.safetensors");
  CHECK(index["weight_map"].size() == 5);

  CHECK(model_shards(items, 29).size() == 4);  // one byte less than c and d and e need
  for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{146}}) {
    REQUIRE(model_shards(items, bytes).size() == 1);
    CHECK(model_shards(items, bytes)[0].file == "model.safetensors");
  }
  CHECK(model_shards(items, 145).size() == 2);
}

TEST_CASE("a merge in shards has the tensors of the single file byte for byte, an index, and merges again") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_inputs(temp);
  const MergeReport single = merge_checkpoints({.inputs = inputs, .output = temp / "single", .weights = {}});
  MergeOptions options{.inputs = inputs, .output = temp / "shards", .weights = {}, .max_shard_bytes = 17000};
  const MergeReport report = merge_checkpoints(options);
  // 41 x 101 floats fit beside the norm's five, but not beside the head's.
  for (const char* name : {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"})
    CHECK(SafetensorsReader(temp / "shards" / name).metadata().at("format") == "pt");
  CHECK(fs::file_size(temp / "shards/model-00002-of-00002.safetensors") < 17000 + 1024);
  CHECK_FALSE(fs::exists(temp / "shards/model.safetensors"));
  CHECK(tensor_bytes(temp / "shards") == tensor_bytes(temp / "single"));
  CHECK(report.bytes_written == single.bytes_written);
  CHECK_FALSE(checkpoint_fault(temp / "shards", ManifestCheck::hashes));

  const Json index = read_json(temp / "shards/model.safetensors.index.json");
  CHECK(index["metadata"]["total_size"] == single.bytes_written);
  CHECK(index["metadata"]["total_parameters"] == single.elements);
  CHECK(index["weight_map"] == Json{{"lm_head.weight", "model-00001-of-00002.safetensors"},
                                    {"model.embed_tokens.weight", "model-00002-of-00002.safetensors"},
                                    {"model.norm.weight", "model-00002-of-00002.safetensors"}});
  // Inputs are hashed on their way into several files as into one.
  CHECK(read_json(temp / "shards/merge.json")["checkpoints"] == read_json(temp / "single/merge.json")["checkpoints"]);
  CHECK(read_json(temp / "shards/merge.json")["checkpoints"][1]["files"][0]["xxh3"] ==
        hash_file(temp / "checkpoint-2/model.safetensors"));

  merge_checkpoints({.inputs = {temp / "shards"}, .output = temp / "again", .weights = {}});
  CHECK(read_text(temp / "again/model.safetensors") == read_text(temp / "single/model.safetensors"));
  // A merge in one file replaces one in shards, and leaves none of them.
  options.max_shard_bytes = 0;
  merge_checkpoints(options);
  CHECK(fs::exists(temp / "shards/model.safetensors"));
  CHECK_FALSE(fs::exists(temp / "shards/model.safetensors.index.json"));
}

TEST_CASE("a fault in the last shard leaves no shard behind") {
  const TempDirectory temp;
  TestModel model = random_model(DType::f32, 1);
  model["model.norm.weight"].values[2] = std::numeric_limits<double>::infinity();
  write_hf_directory(temp / "checkpoint-1", model);
  CHECK_THROWS_WITH(
      merge_checkpoints(
          {.inputs = {temp / "checkpoint-1"}, .output = temp / "out", .weights = {}, .max_shard_bytes = 100}),
      ContainsSubstring("'model.norm.weight' holds inf at element 2"));
  check_only(temp.path(), {"checkpoint-1"});
}

TEST_CASE("the size of a shard is a size, and not zero") {
  MergeRequest request;
  set_merge_key(request, "max_shard_size", {"2GiB"}, "--max-shard-size");
  CHECK(request.options.max_shard_bytes == std::uint64_t{2} << 30);
  CHECK_THROWS_WITH(set_merge_key(request, "max_shard_size", {"0"}, "--max-shard-size"),
                    ContainsSubstring("--max-shard-size: ") && ContainsSubstring("expected 1 byte or more"));
  CHECK_THROWS_WITH(set_merge_key(request, "max_shard_size", {"2 gigs"}, "--max-shard-size"),
                    ContainsSubstring("'2 gigs' is not a size"));
}

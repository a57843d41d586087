#include <algorithm>

#include "merge/streaming_merge.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

const fs::path kGolden = fs::path(KILN_GOLDEN_DIR) / "merge";

/// Compares a merge of the two directories, bit for bit, with what PyTorch made of them.
void check_expected(MergeMethod method, MergeDtype dtype, std::uint64_t max_shard_bytes) {
  const TempDirectory temp;
  merge_checkpoints({.inputs = {kGolden / "checkpoint-100", kGolden / "checkpoint-200"},
                     .output = temp / "out",
                     .weights = {.method = method},
                     .dtype = dtype,
                     .max_shard_bytes = max_shard_bytes});
  const SafetensorsReader expected(kGolden / "expected.safetensors");
  const ModelTensors merged(temp / "out");
  CHECK(merged.files().size() == (max_shard_bytes == 0 ? 1u : 5u));
  REQUIRE(merged.all().size() == 11);  // the tied head is not among them
  for (const auto& [name, source] : merged.all()) {
    const std::string key =
        fmt::format("{}.{}.{}", to_string(method), dtype == MergeDtype::fp32 ? "fp32" : "bf16", name);
    INFO(key);
    const SafetensorEntry* entry = expected.find(key);
    REQUIRE(entry != nullptr);
    CHECK(source.entry->shape == entry->shape);
    REQUIRE(source.entry->dtype == entry->dtype);
    CHECK(std::ranges::equal(source.file->bytes(*source.entry), expected.bytes(*entry)));
  }
  const Json config = read_json(temp / "out/config.json");
  CHECK(config["dtype"] == (dtype == MergeDtype::fp32 ? "float32" : "bfloat16"));
  CHECK(config["tie_word_embeddings"] == true);
  CHECK(config["rope_parameters"]["rope_theta"] == 10000.0);
  CHECK(read_text(temp / "out/generation_config.json") == read_text(kGolden / "checkpoint-200/generation_config.json"));
}

}  // namespace

TEST_CASE("directories of transformers, one in shards, merge to PyTorch's fp64 mean rounded once, bit for bit") {
  CHECK(ModelTensors(kGolden / "checkpoint-200").files().size() == 3);
  for (const MergeMethod method : {MergeMethod::sma, MergeMethod::wma})
    for (const MergeDtype dtype : {MergeDtype::fp32, MergeDtype::bf16, MergeDtype::same})
      check_expected(method, dtype, 0);
}

TEST_CASE("in shards the merge of such directories has the same bits") {
  check_expected(MergeMethod::wma, MergeDtype::bf16, 600);
}

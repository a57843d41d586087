#include "merge/optimizer_merge.h"

#include "merge/streaming_merge.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

const std::string kFile = "optimizer-00000-of-00001.safetensors";

/// A checkpoint with AdamW-like states, and a projector whose values are `basis`.
fs::path write_run_checkpoint(const TempDirectory& temp, std::int64_t step, double basis = 1.0,
                              DType dtype = DType::f32, const std::string& member_state = "projector") {
  const fs::path directory = temp / checkpoint_name(step);
  const auto value = static_cast<double>(step);
  CheckpointWriter writer(directory);
  write_safetensors(writer.directory() / "model.safetensors", {{"x", {DType::f32, {2}, {value, -value}}}});
  write_safetensors(writer.directory() / kFile, {{"x.exp_avg", {dtype, {2}, {0.5 * value, 3.0}}},
                                                 {"x.exp_avg_sq", {dtype, {2}, {value, value * value}}},
                                                 {"x." + member_state, {DType::f32, {1}, {basis}}}});
  writer.write_json("config.json", test_config());
  writer.write_json("state.json", {{"step", step}, {"tokens", 10 * step}});
  writer.commit();
  return directory;
}

std::vector<double> states_of(const fs::path& directory, const std::string& name) {
  const SafetensorsReader reader(directory / kFile);
  const SafetensorEntry* entry = reader.find(name);
  REQUIRE(entry != nullptr);
  std::vector<double> values((entry->end - entry->begin) / size_of(entry->dtype));
  reader.read_floats(*entry, 0, std::span<double>(values));
  return values;
}

}  // namespace

TEST_CASE("optimizer states are left out, kept from the newest, or averaged with the model's weights") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs{write_run_checkpoint(temp, 1), write_run_checkpoint(temp, 2),
                                     write_run_checkpoint(temp, 3)};
  MergeOptions options{.inputs = inputs, .output = temp / "out", .weights = {.method = MergeMethod::wma}};
  merge_checkpoints(options);
  CHECK_FALSE(fs::exists(temp / "out" / kFile));
  CHECK(read_json(temp / "out" / "merge.json")["optimizer_state"] == "reset");

  options.optimizer_state = OptimizerStateMerge::keep_last;
  merge_checkpoints(options);
  CHECK(read_text(temp / "out" / kFile) == read_text(inputs[2] / kFile));

  options.optimizer_state = OptimizerStateMerge::average;
  merge_checkpoints(options);
  // Weights 1/6, 2/6, 3/6.
  CHECK(states_of(temp / "out", "x.exp_avg")[0] == Approx(0.5 * 14.0 / 6.0));
  CHECK(states_of(temp / "out", "x.exp_avg")[1] == Approx(3.0));
  CHECK(states_of(temp / "out", "x.exp_avg_sq")[1] == Approx(36.0 / 6.0));
  CHECK(states_of(temp / "out", "x.projector")[0] == 1.0);
  CHECK(read_json(temp / "out" / "merge.json")["optimizer_state"] == "average");
  CHECK_FALSE(checkpoint_fault(temp / "out", ManifestCheck::hashes).has_value());
}

TEST_CASE("states that have no average are refused before a byte is written") {
  const TempDirectory temp;
  MergeOptions options{.inputs = {write_run_checkpoint(temp, 1)}, .output = temp / "out", .weights = {}};
  options.optimizer_state = OptimizerStateMerge::average;
  SECTION("a refreshed projector") {
    options.inputs.push_back(write_run_checkpoint(temp, 2, 0.5));
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("'x.projector' differs"));
  }
  SECTION("factors of LoRA") {
    options.inputs = {write_run_checkpoint(temp, 1, 1.0, DType::f32, "lora_a"),
                      write_run_checkpoint(temp, 2, 0.5, DType::f32, "lora_a")};
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("'x.lora_a' differs"));
  }
  SECTION("moments in random bases") {
    options.inputs = {write_run_checkpoint(temp, 1, 1.0, DType::f32, "limiter_norm"),
                      write_run_checkpoint(temp, 2, 1.0, DType::f32, "limiter_norm")};
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("'x.limiter_norm' belongs to moments in a random"));
  }
  SECTION("another dtype") {
    options.inputs.push_back(write_run_checkpoint(temp, 2, 1.0, DType::bf16));
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("has another shape or dtype"));
  }
  SECTION("no states") {
    write_checkpoint(temp / "step_00000002", {{"x", {DType::f32, {2}, {1.0, 2.0}}}}, 2);
    options.inputs.push_back(temp / "step_00000002");
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("holds no optimizer state"));
    options.optimizer_state = OptimizerStateMerge::keep_last;
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("holds no optimizer state"));
  }
  SECTION("a negative weight") {
    options.inputs.push_back(write_run_checkpoint(temp, 2));
    options.weights = {.method = MergeMethod::custom, .custom = {-0.5, 1.5}};
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("a weight is negative"));
  }
  CHECK_FALSE(fs::exists(temp / "out"));
}

TEST_CASE("names of what becomes of optimizer states") {
  for (const auto merge : {OptimizerStateMerge::reset, OptimizerStateMerge::keep_last, OptimizerStateMerge::average})
    CHECK(parse_optimizer_state_merge(to_string(merge)) == merge);
  CHECK_THROWS_WITH(parse_optimizer_state_merge("keep"), ContainsSubstring("use one of reset, keep-last, average"));
}

#include "merge/streaming_merge.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

/// Names and write times of all files below a directory.
std::map<fs::path, fs::file_time_type> listing(const fs::path& directory) {
  std::map<fs::path, fs::file_time_type> all;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) all[entry.path()] = entry.last_write_time();
  return all;
}

struct Inputs {
  TempDirectory temp;
  MergeOptions options{.inputs = {},
                       .output = temp / "home/out",
                       .weights = {.method = MergeMethod::ema_closed},
                       .optimizer_state = OptimizerStateMerge::keep_last,
                       .max_shard_bytes = 17000,
                       .dry_run = true};
  Inputs() {
    write_hf_directory(temp / "checkpoint-1", random_model(DType::bf16, 1));
    for (const std::int64_t step : {2, 3}) {
      CheckpointWriter writer(temp / checkpoint_name(step));
      const TestModel model = random_model(DType::f32, static_cast<std::uint64_t>(step));
      write_safetensors(writer.directory() / "model.safetensors", model);
      write_safetensors(writer.directory() / "optimizer-00000-of-00001.safetensors", {{"x", {DType::f32, {1}, {0.5}}}});
      writer.write_json("config.json", test_config());
      writer.write_json("state.json", {{"step", step}, {"tokens", step * 1000}, {"rescued_from", {{"number", 1}}}});
      writer.write_json("tokenizer_config.json", Json::object());
      writer.commit();
    }
    options.inputs = {temp / "checkpoint-1", temp / checkpoint_name(2), temp / checkpoint_name(3)};
  }
};

}  // namespace

TEST_CASE("a dry run tells weights, decay and every file of the merge, and writes nothing") {
  Inputs in;
  const auto before = listing(in.temp.path());
  const MergeReport dry = merge_checkpoints(in.options);
  CHECK(listing(in.temp.path()) == before);
  CHECK(dry.dry_run);
  CHECK(dry.input_files == 3);
  CHECK(dry.verified_files == 2);  // the first records no hash

  in.options.dry_run = false;
  const MergeReport real = merge_checkpoints(in.options);
  CHECK_FALSE(real.dry_run);
  check_only(in.options.output, dry.files);
  CHECK(dry.files == real.files);
  CHECK_FALSE(read_json(in.options.output / "state.json").contains("rescued_from"));  // the input's run was, not this
  CHECK(dry.output == real.output);
  CHECK(dry.bytes_read == real.bytes_read);
  CHECK(dry.bytes_written == real.bytes_written);
  CHECK(to_json(dry)["checkpoints"] == to_json(real)["checkpoints"]);
  CHECK(to_json(dry)["dry_run"] == true);

  const std::string text = merge_table(dry);
  CHECK_THAT(text, ContainsSubstring("0.332103"));  // 0.1 of a sum of 0.271, times 0.9
  CHECK_THAT(text, ContainsSubstring("2 of 3 model files match a recorded hash; the others were not compared"));
  CHECK_THAT(text, ContainsSubstring("model-00001-of-00002.safetensors") && ContainsSubstring("nothing was written"));
  CHECK_THAT(merge_table(real), !ContainsSubstring("nothing was written") && ContainsSubstring("wrote"));
}

TEST_CASE("a dry run refuses what a merge refuses") {
  Inputs in;
  const auto refused = [&](const std::string& text) {
    const auto before = listing(in.temp.path());
    CHECK_THROWS_WITH(merge_checkpoints(in.options), ContainsSubstring(text));
    CHECK(listing(in.temp.path()) == before);
  };
  SECTION("a hash") {
    const fs::path model = in.options.inputs[1] / "model.safetensors";
    std::fstream(model, std::ios::in | std::ios::out | std::ios::binary).seekp(-4, std::ios::end).write("bits", 4);
    refused("model.safetensors does not match its hash");
    in.options.verify = false;
    CHECK(merge_checkpoints(in.options).verified_files == 0);
  }
  SECTION("a shape") {
    TestModel model = random_model(DType::f32, 1);
    model["model.norm.weight"] = {DType::f32, {6}, random_values(6, 1)};
    write_hf_directory(in.temp / "checkpoint-1", model);
    refused("'model.norm.weight' has the shape [5], expected [6]");
  }
  SECTION("an output that is something else") {
    fs::create_directories(in.options.output);
    write_text_atomic(in.options.output / "notes", "mine");
    refused("no earlier merge");
  }
  SECTION("a place that cannot be written") {
    in.options.output = "/proc/nowhere/merged";
    refused("cannot be created");
    write_text_atomic(in.temp / "file", "mine");
    in.options.output = in.temp / "file/merged";
    refused("cannot be created in");
  }
  SECTION("optimizer states that are not there") {
    in.options.inputs = {in.temp / "checkpoint-1"};
    refused("optimizer");
  }
}

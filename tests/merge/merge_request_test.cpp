#include "merge/merge_request.h"

#include "merge/inputs.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

fs::path write_yaml(const TempDirectory& temp, const std::string& text) {
  write_text_atomic(temp / "merge.yaml", text);
  return temp / "merge.yaml";
}

void write_run(const fs::path& run, int count) {
  for (int i = 1; i <= count; ++i)
    write_checkpoint(run / checkpoint_name(i), {{"x", {DType::f32, {1}, {static_cast<double>(i)}}}}, i);
}

std::vector<std::int64_t> steps_of(const std::vector<fs::path>& directories) {
  std::vector<std::int64_t> steps;
  for (const fs::path& directory : directories) steps.push_back(step_of(directory).value());
  return steps;
}

}  // namespace

TEST_CASE("every key of a merge file is read") {
  const TempDirectory temp;
  const MergeRequest request =
      read_merge_file(write_yaml(temp,
                                 "checkpoints: [a, b]\nmethod: ema-closed\nout: c\n"
                                 "alpha: 0.2\nshape: 1-sqrt\nfinal_ratio: 0.1\nlast: 5\n"
                                 "every: 2\ndtype: same\nverify: false\nkeep_order: true\n"
                                 "normalise: false\nweights: [0.5, 0.5]\ndecay: [0.9]\n"
                                 "optimizer_state: keep-last\nmax_shard_size: 5KB\ndry_run: true\n"));
  CHECK(request.options.optimizer_state == OptimizerStateMerge::keep_last);
  CHECK(request.checkpoints == std::vector<std::string>{"a", "b"});
  CHECK(request.options.max_shard_bytes == 5000);
  CHECK(request.options.dry_run);
  CHECK(request.last == 5);
  CHECK(request.every == 2);
  CHECK(request.options.output == "c");
  CHECK(request.options.dtype == MergeDtype::same);
  CHECK_FALSE(request.options.verify);
  CHECK(request.options.keep_order);
  CHECK(request.options.weights.method == MergeMethod::ema_closed);
  CHECK(request.options.weights.alpha == 0.2);
  CHECK(request.options.weights.shape == DecayShape::one_minus_sqrt);
  CHECK(request.options.weights.final_ratio == 0.1);
  CHECK_FALSE(request.options.weights.normalise);
  CHECK(request.options.weights.custom == std::vector<double>{0.5, 0.5});
  CHECK(request.options.weights.decay == std::vector<double>{0.9});
}

TEST_CASE("faults of a merge file are shown by file, line and column") {
  const TempDirectory temp;
  auto check_fault = [&](const std::string& text, const std::string& where, const std::string& what) {
    const fs::path path = write_yaml(temp, text);
    CHECK_THROWS_WITH(read_merge_file(path), ContainsSubstring(path.string() + where));
    CHECK_THROWS_WITH(read_merge_file(path), ContainsSubstring(what));
  };
  check_fault("out: c\n  \nmethdo: sma\n", ":3:1", "unknown key 'methdo'; the nearest is 'method'");
  check_fault("out: c\nmethod: swa\n", ":2:1", "'swa' does not exist; use one of sma");
  check_fault("alpha: [1, 2]\n", ":1:1", "found 2 values");
  check_fault("alpha: 0.1x\n", ":1:1", "found '0.1x', expected a number");
  check_fault("last: -3\n", ":1:1", "expected a whole number");
  check_fault("verify: perhaps\n", ":1:1", "expected true or false");
  check_fault("out: a\nout: b\n", ":2:1", "a second time");
  check_fault("out: {a: b}\n", ":1:1", "expected a scalar or a list");
  check_fault("out: [a\n", ":2:1", "correct the YAML");
  check_fault("- a\n", ":1:1", "expected a map");
}

TEST_CASE("a run's directory becomes its whole checkpoints, every K-th and the last N") {
  const TempDirectory temp;
  write_run(temp.path(), 9);
  fs::remove(temp / "step_00000009" / "MANIFEST.json");  // torn
  MergeRequest request;
  request.checkpoints = {temp.path().string()};
  CHECK(steps_of(resolve_merge(request).inputs) == std::vector<std::int64_t>{1, 2, 3, 4, 5, 6, 7, 8});
  request.every = 3;
  CHECK(steps_of(resolve_merge(request).inputs) == std::vector<std::int64_t>{2, 5, 8});
  request.last = 2;
  CHECK(steps_of(resolve_merge(request).inputs) == std::vector<std::int64_t>{5, 8});
  request.last = 4;
  CHECK_THROWS_WITH(resolve_merge(request),
                    ContainsSubstring("last: 4 checkpoints are asked for, but every 3-th of 8"));
  request.every = 0;
  CHECK_THROWS_AS(resolve_merge(request), Error);
}

TEST_CASE("snapshots of a run, patterns, and paths that hold nothing") {
  const TempDirectory temp;
  write_run(temp / "run", 1);
  write_run(temp / "run" / "snapshots", 3);
  MergeRequest request;
  request.checkpoints = {(temp / "run").string()};
  CHECK(resolve_merge(request).inputs.size() == 3);
  request.checkpoints = {(temp / "run" / "snapshots" / "step_*[23]").string()};
  CHECK(steps_of(resolve_merge(request).inputs) == std::vector<std::int64_t>{2, 3});
  fs::create_directories(temp / "empty");
  request.checkpoints = {(temp / "empty").string()};
  CHECK_THROWS_WITH(resolve_merge(request), ContainsSubstring("neither a checkpoint"));
  request.checkpoints = {(temp / "nowhere").string()};
  CHECK_THROWS_WITH(resolve_merge(request), ContainsSubstring("nowhere"));
  request.checkpoints = {};
  CHECK_THROWS_AS(resolve_merge(request), Error);
}

TEST_CASE("lists of weights choose the method or contradict it") {
  const TempDirectory temp;
  write_run(temp.path(), 2);
  MergeRequest request;
  request.checkpoints = {temp.path().string()};
  set_merge_key(request, "weights", {"0.25", "0.75"}, "--weights");
  CHECK(resolve_merge(request).weights.method == MergeMethod::custom);
  set_merge_key(request, "method", {"ema"}, "--method");
  CHECK_THROWS_WITH(resolve_merge(request), ContainsSubstring("beside method ema"));
  request.options.weights = {.method = MergeMethod::sma, .decay = {0.5}};
  CHECK_THROWS_WITH(resolve_merge(request), ContainsSubstring("use method schedule or qam"));
  request.options.weights = {.method = MergeMethod::qam, .decay = {0.5}};
  CHECK(resolve_merge(request).weights.decay == std::vector<double>{0.5});
  CHECK_THROWS_WITH(set_merge_key(request, "alpha", {"x"}, "--alpha"), ContainsSubstring("--alpha: "));
}

TEST_CASE("a key that the method does not read is refused") {
  const TempDirectory temp;
  write_run(temp.path(), 2);
  const auto resolved = [&](const std::string& key, const std::string& value, const std::string& method) {
    MergeRequest request;
    request.checkpoints = {temp.path().string()};
    set_merge_key(request, key, {value}, "--" + key);
    set_merge_key(request, "method", {method}, "--method");
    return resolve_merge(request).weights;
  };
  CHECK_THROWS_WITH(resolved("alpha", "0.5", "sma"),
                    ContainsSubstring("alpha is given, which method sma does not read"));
  CHECK_THROWS_WITH(resolved("shape", "cosine", "wma"), ContainsSubstring("use method schedule or qam"));
  CHECK_THROWS_WITH(resolved("final_ratio", "0.1", "ema"), ContainsSubstring("final_ratio"));
  CHECK_THROWS_WITH(resolved("normalise", "false", "schedule"), ContainsSubstring("ema-closed or custom"));
  CHECK(resolved("alpha", "0.5", "ema-closed").alpha == 0.5);
  CHECK(resolved("shape", "cosine", "qam").shape == DecayShape::cosine);
}

TEST_CASE("steps are known by state, by transformers' own state, or by name") {
  const TempDirectory temp;
  write_run(temp.path(), 1);
  fs::rename(temp / "step_00000001", temp / "checkpoint-77");
  CHECK(step_of(temp / "checkpoint-77") == 1);
  CHECK(step_of(temp / "checkpoint-500") == 500);
  CHECK(step_of("runs/step_00000020/") == 20);
  CHECK(step_of("step1000-tokens4B") == 1000);
  CHECK_FALSE(step_of(temp / "final").has_value());
  fs::create_directories(temp / "final");
  write_text_atomic(temp / "final" / "trainer_state.json", R"({"global_step": 12})");
  CHECK(step_of(temp / "final") == 12);
}

TEST_CASE("a report as table and as JSON") {
  const MergeReport report{.checkpoints = {{"run/step_00000010", 10, 1000, 0.25, std::nullopt},
                                           {"run/step_00000020", std::nullopt, std::nullopt, 0.75, 0.75}},
                           .tensors = 3,
                           .elements = 1500,
                           .bytes_read = 2048,
                           .bytes_written = 1024,
                           .seconds = 0.5};
  const std::string table = merge_table(report);
  CHECK_THAT(table, ContainsSubstring("checkpoint               step     weight      decay\n"));
  CHECK_THAT(table, ContainsSubstring("run/step_00000010          10   0.250000          -\n"));
  CHECK_THAT(table, ContainsSubstring("run/step_00000020           -   0.750000   0.750000\n"));
  CHECK_THAT(table, ContainsSubstring("3 tensors, 1.5k weights: read 2.00 KiB, wrote 1.00 KiB in 0.50 s\n"));
  const Json json = to_json(report);
  CHECK(json["checkpoints"][1]["step"].is_null());
  CHECK(json["checkpoints"][1]["decay"] == 0.75);
  CHECK(json["bytes_read"] == 2048);
}

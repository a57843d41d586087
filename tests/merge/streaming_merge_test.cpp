#include "merge/streaming_merge.h"

#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/parallel.h"
#include "core/weighted_sum.h"
#include "merge/average.h"
#include "merge_fixture.h"

using namespace kiln;

namespace {

/// The same sum in fp64, oldest first, over what the inputs hold after rounding to their dtype.
std::vector<double> reference(const std::vector<fs::path>& inputs, const std::vector<double>& weights,
                              const std::string& name) {
  std::vector<double> sum(read_values(inputs.front(), name).size(), 0.0);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::vector<double> x = read_values(inputs[i], name);
    for (std::size_t k = 0; k < x.size(); ++k) {
      const volatile double product = weights[i] * x[k];  // no fused multiply-add
      sum[k] += product;
    }
  }
  return sum;
}

/// Merges and compares every tensor with the reference, rounded by `round`, bit for bit.
template <typename Round>
void check_bitwise(const MergeOptions& options, const std::vector<std::string>& names, Round round) {
  merge_checkpoints(options);
  const std::vector<double> weights = merge_weights(options.weights, options.inputs.size());
  for (const std::string& name : names) {
    const std::vector<double> expected = reference(options.inputs, weights, name);
    const std::vector<double> found = read_values(options.output, name);
    REQUIRE(found.size() == expected.size());
    std::size_t different = 0;
    for (std::size_t k = 0; k < found.size(); ++k)
      different += std::bit_cast<std::uint64_t>(found[k]) != std::bit_cast<std::uint64_t>(round(expected[k]));
    INFO(name);
    CHECK(different == 0);
  }
}

double as_float(double value) { return static_cast<double>(static_cast<float>(value)); }

const std::vector<std::string> kNames{"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"};

std::vector<fs::path> write_three(const TempDirectory& temp, DType dtype) {
  std::vector<fs::path> inputs;
  for (int i = 1; i <= 3; ++i) {
    inputs.push_back(temp / checkpoint_name(10 * i));
    write_checkpoint(inputs.back(), random_model(dtype, static_cast<std::uint64_t>(i)), 10 * i);
  }
  return inputs;
}

}  // namespace

TEST_CASE("fp32 checkpoints merge to the fp64 sum rounded once, bit for bit") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  for (const MergeMethod method : {MergeMethod::sma, MergeMethod::wma, MergeMethod::ema, MergeMethod::schedule})
    check_bitwise({.inputs = inputs, .output = temp / "out", .weights = {.method = method}}, kNames, as_float);
}

TEST_CASE("bf16 and f16 checkpoints merge to fp32, and to their own dtype with one rounding") {
  const TempDirectory temp;
  SECTION("bf16") {
    const std::vector<fs::path> inputs = write_three(temp, DType::bf16);
    check_bitwise({.inputs = inputs, .output = temp / "fp32", .weights = {.method = MergeMethod::wma}}, kNames,
                  as_float);
    check_bitwise({.inputs = inputs, .output = temp / "same", .weights = {}, .dtype = MergeDtype::same}, kNames,
                  [](double v) { return static_cast<double>(to_float(round_to_bfloat16(v))); });
    CHECK(SafetensorsReader(temp / "same" / "model.safetensors").entries().front().dtype == DType::bf16);
  }
  SECTION("f16") {
    const std::vector<fs::path> inputs = write_three(temp, DType::f16);
    check_bitwise({.inputs = inputs, .output = temp / "same", .weights = {}, .dtype = MergeDtype::same}, kNames,
                  [](double v) { return static_cast<double>(to_float(round_to_float16(v))); });
  }
}

TEST_CASE("dtypes that differ between checkpoints and between tensors of one are widened to fp64 and rounded once") {
  const TempDirectory temp;
  std::vector<fs::path> inputs;
  std::uint64_t step = 0;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    TestModel model = random_model(dtype, ++step);
    if (dtype == DType::bf16) model["model.norm.weight"].dtype = DType::f32;  // as mixed-precision exports keep norms
    if (dtype == DType::f64) model["model.embed_tokens.weight"].dtype = DType::bf16;
    inputs.push_back(temp / fmt::format("checkpoint-{}", step));
    write_hf_directory(inputs.back(), model);
  }
  const WeightOptions weights{.method = MergeMethod::wma};
  const int threads = thread_count();
  for (const int count : {1, 3}) {
    set_thread_count(count);
    check_bitwise({.inputs = inputs, .output = temp / "fp32", .weights = weights, .chunk_elements = 1000}, kNames,
                  as_float);
  }
  set_thread_count(threads);
  // `same` takes each tensor's dtype from the newest checkpoint, also where the order given says otherwise.
  merge_checkpoints({.inputs = {inputs[3], inputs[0], inputs[1], inputs[2]},
                     .output = temp / "same",
                     .weights = {},
                     .dtype = MergeDtype::same,
                     .keep_order = true});
  const SafetensorsReader same(temp / "same/model.safetensors");
  CHECK(same.find("lm_head.weight")->dtype == DType::f64);
  CHECK(same.find("model.embed_tokens.weight")->dtype == DType::bf16);
  const std::vector<double> sum =
      reference({inputs[3], inputs[0], inputs[1], inputs[2]}, {0.25, 0.25, 0.25, 0.25}, "model.embed_tokens.weight");
  const std::vector<double> found = read_values(temp / "same", "model.embed_tokens.weight");
  std::size_t different = 0;
  for (std::size_t k = 0; k < sum.size(); ++k)
    different += found[k] != static_cast<double>(to_float(round_to_bfloat16(sum[k])));
  CHECK(different == 0);
  const Json merge = read_json(temp / "same/merge.json");
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(merge["checkpoints"][i]["files"][0]["xxh3"] ==
          hash_file(merge["checkpoints"][i]["path"].get<std::string>() + "/model.safetensors"));
}

TEST_CASE("rounding to bf16 and f16 is single") {
  // Just above the tie between 1 and 1 + 2^-7: through fp32 the 2^-40 is lost and the tie goes to even, down.
  CHECK(to_float(round_to_bfloat16(1.0 + 0x1p-8 + 0x1p-40)) == 1.0f + 0x1p-7f);
  CHECK(to_float(to_bfloat16(static_cast<float>(1.0 + 0x1p-8 + 0x1p-40))) == 1.0f);
  CHECK(to_float(round_to_bfloat16(1.0 + 0x1p-8)) == 1.0f);
  CHECK(to_float(round_to_bfloat16(-(1.0 + 0x1p-7 + 0x1p-8 - 0x1p-40))) == -(1.0f + 0x1p-7f));
  CHECK(to_float(round_to_float16(1.0 + 0x1p-11 + 0x1p-40)) == 1.0f + 0x1p-10f);
  CHECK(to_float(round_to_float16(0x1p-25 + 0x1p-60)) == 0x1p-24f);
  CHECK(to_float(round_to_float16(0x1p-25)) == 0.0f);
  CHECK(to_float(round_to_bfloat16(1e-60)) == 0.0f);
  CHECK(std::isinf(to_float(round_to_bfloat16(1e60))));
  CHECK(std::isnan(to_float(round_to_bfloat16(std::nan("")))));
}

TEST_CASE("the result depends neither on the chunk nor on the threads") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  const int threads = thread_count();
  std::vector<std::string> hashes;
  for (const std::size_t chunk : {std::size_t{1} << 20, std::size_t{1000}, std::size_t{7}})
    for (const int count : {1, 3}) {
      set_thread_count(count);
      merge_checkpoints(
          {.inputs = inputs, .output = temp / "out", .weights = {.method = MergeMethod::ema}, .chunk_elements = chunk});
      hashes.push_back(hash_file(temp / "out" / "model.safetensors"));
    }
  set_thread_count(threads);
  for (const std::string& hash : hashes) CHECK(hash == hashes.front());
}

/// Tensors of many pieces.
TestModel wide_model(std::uint64_t stream) {
  return {{"a.weight", {DType::f32, {301, 401}, random_values(301 * 401, stream * 4)}},
          {"b.weight", {DType::f32, {7}, random_values(7, stream * 4 + 1)}},
          {"c.weight", {DType::f32, {0, 3}, {}}},
          {"d.weight", {DType::f32, {97, 1031}, random_values(97 * 1031, stream * 4 + 2)}}};
}

/// One file with its tensors in the order of their names turned round.
void write_reversed(const fs::path& directory, const TestModel& model) {
  Json header = Json::object();
  std::vector<std::byte> data;
  for (auto at = model.rbegin(); at != model.rend(); ++at) {
    const std::vector<std::byte> bytes = to_storage(at->second);
    header[at->first] = {{"dtype", safetensors_name(at->second.dtype)},
                         {"shape", at->second.shape},
                         {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data.insert(data.end(), bytes.begin(), bytes.end());
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  fs::create_directories(directory);
  std::ofstream out(directory / "model.safetensors", std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), sizeof(length)) << text;
  out.write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
  write_text_atomic(directory / "config.json", test_config().dump());
}

TEST_CASE("files without a manifest are hashed while they are averaged, in any order and on any number of threads") {
  const TempDirectory temp;
  write_hf_directory(temp / "checkpoint-1", wide_model(1));
  write_sharded_directory(temp / "checkpoint-2", wide_model(2));
  write_reversed(temp / "checkpoint-3", wide_model(3));
  write_checkpoint(temp / "checkpoint-4", wide_model(4), 4);
  const std::vector<fs::path> inputs{temp / "checkpoint-1", temp / "checkpoint-2", temp / "checkpoint-3",
                                     temp / "checkpoint-4"};
  merge_checkpoints({.inputs = inputs, .output = temp / "plain", .weights = {}, .verify = false});
  const int threads = thread_count();
  for (const int count : {1, 2, 7})
    for (const std::size_t chunk : {std::size_t{1} << 19, std::size_t{1000}}) {
      INFO(count << " threads, chunks of " << chunk);
      set_thread_count(count);
      merge_checkpoints({.inputs = inputs, .output = temp / "out", .weights = {}, .chunk_elements = chunk});
      CHECK(hash_file(temp / "out/model.safetensors") == hash_file(temp / "plain/model.safetensors"));
      const Json merge = read_json(temp / "out/merge.json");
      std::size_t files = 0;
      for (std::size_t i = 0; i < inputs.size(); ++i)
        for (const Json& file : merge["checkpoints"][i]["files"]) {
          CHECK(file["xxh3"] == hash_file(inputs[i] / file["name"].get<std::string>()));
          ++files;
        }
      CHECK(files == 5);
    }
  // A fault ends it for the threads that wait for their turn to hash.
  TestModel damaged = wide_model(5);
  damaged["a.weight"].values[70000] = std::nan("");
  fs::remove_all(temp / "checkpoint-1");
  write_hf_directory(temp / "checkpoint-1", damaged);
  for (int round = 0; round < 20; ++round)
    CHECK_THROWS_WITH(
        merge_checkpoints({.inputs = inputs, .output = temp / "out", .weights = {}, .chunk_elements = 1000}),
        ContainsSubstring("'a.weight' holds nan at element 70000"));
  set_thread_count(threads);
}

TEST_CASE("sharded directories merge with plain ones, in names, shapes and bits") {
  const TempDirectory temp;
  const TestModel a = random_model(DType::f32, 1), b = random_model(DType::f32, 2);
  write_hf_directory(temp / "checkpoint-1", a);
  write_hf_directory(temp / "checkpoint-2", b);
  write_sharded_directory(temp / "sharded" / "checkpoint-2", b);
  merge_checkpoints(
      {.inputs = {temp / "checkpoint-1", temp / "checkpoint-2"}, .output = temp / "plain", .weights = {}});
  merge_checkpoints(
      {.inputs = {temp / "checkpoint-1", temp / "sharded" / "checkpoint-2"}, .output = temp / "out", .weights = {}});
  CHECK(read_text(temp / "out" / "model.safetensors") == read_text(temp / "plain" / "model.safetensors"));
  merge_checkpoints(
      {.inputs = {temp / "sharded" / "checkpoint-2"}, .output = temp / "copy", .weights = {}, .verify = false});
  // No manifest and no verification: no hash.
  CHECK(read_json(temp / "copy" / "merge.json")["checkpoints"][0]["files"][1]["xxh3"].is_null());
  CHECK(read_json(temp / "out" / "merge.json")["checkpoints"][0]["files"][0]["xxh3"] ==
        hash_file(temp / "checkpoint-1" / "model.safetensors"));
  CHECK(read_text(temp / "copy" / "model.safetensors") == read_text(temp / "checkpoint-2" / "model.safetensors"));
}

TEST_CASE("a tied head that is stored beside the embedding stays equal to it") {
  const TempDirectory temp;
  std::vector<fs::path> inputs;
  for (const std::uint64_t step : {1u, 2u, 3u}) {
    TestModel model = random_model(DType::f32, step);
    model["lm_head.weight"] = model["model.embed_tokens.weight"];
    inputs.push_back(temp / fmt::format("checkpoint-{}", step));
    write_hf_directory(inputs.back(), model);
  }
  merge_checkpoints({.inputs = inputs, .output = temp / "out", .weights = {.method = MergeMethod::ema}});
  CHECK(read_values(temp / "out", "lm_head.weight") == read_values(temp / "out", "model.embed_tokens.weight"));
}

TEST_CASE("the table notes weights that scale the model") {
  const TempDirectory temp;
  MergeOptions options{.inputs = write_three(temp, DType::f32), .output = temp / "out", .weights = {}};
  CHECK_THAT(merge_table(merge_checkpoints(options)), !ContainsSubstring("the weights sum to"));
  options.weights = {.method = MergeMethod::ema_closed, .normalise = false};
  CHECK_THAT(merge_table(merge_checkpoints(options)), ContainsSubstring("the weights sum to 0.271"));
}

TEST_CASE("tied checkpoints have no lm_head, and neither has their merge") {
  const TempDirectory temp;
  TestModel a = random_model(DType::f32, 1), b = random_model(DType::f32, 2);
  a.erase("lm_head.weight");
  b.erase("lm_head.weight");
  write_checkpoint(temp / "step_00000001", a, 1);
  write_checkpoint(temp / "step_00000002", b, 2);
  check_bitwise({.inputs = {temp / "step_00000001", temp / "step_00000002"}, .output = temp / "out", .weights = {}},
                {"model.embed_tokens.weight", "model.norm.weight"}, as_float);
  CHECK(SafetensorsReader(temp / "out" / "model.safetensors").entries().size() == 2);
}

TEST_CASE("a merge in fp16 rounds the fp64 sum once, and says its decay") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  merge_checkpoints({.inputs = inputs,
                     .output = temp / "half",
                     .weights = {.method = MergeMethod::qam, .shape = DecayShape::cosine, .final_ratio = 0.1},
                     .dtype = MergeDtype::fp16});
  merge_checkpoints({.inputs = inputs,
                     .output = temp / "single",
                     .weights = {.method = MergeMethod::qam, .shape = DecayShape::cosine, .final_ratio = 0.1}});
  const SafetensorsReader half(temp / "half/model.safetensors"), single(temp / "single/model.safetensors");
  for (const SafetensorEntry& entry : half.entries()) {
    CHECK(entry.dtype == DType::f16);
    const auto count = static_cast<std::size_t>(
        std::accumulate(entry.shape.begin(), entry.shape.end(), std::int64_t{1}, std::multiplies<>()));
    std::vector<float> a(count), b(count);
    half.read_floats(entry, 0, std::span<float>(a));
    single.read_floats(*single.find(entry.name), 0, std::span<float>(b));
    // Through f32 a number may be rounded twice, which moves it by one unit at most.
    std::size_t others = 0;
    for (std::size_t i = 0; i < count; ++i) others += a[i] != to_float(to_float16(b[i])) ? 1 : 0;
    CHECK(others <= count / 500);
  }
  CHECK(read_json(temp / "half/config.json")["torch_dtype"] == "float16");
  const Json merge = read_json(temp / "half/merge.json");
  CHECK(merge["dtype"] == "fp16");
  CHECK(merge["shape"] == "cosine");
  CHECK(merge["final_ratio"] == 0.1);
}

TEST_CASE("a merge is a whole checkpoint that says where it came from") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  const MergeReport report = merge_checkpoints(
      {.inputs = inputs, .output = temp / "out", .weights = {.method = MergeMethod::ema}, .dtype = MergeDtype::bf16});
  CHECK_FALSE(checkpoint_fault(temp / "out", ManifestCheck::hashes).has_value());
  CHECK(read_text(temp / "out" / "tokenizer.model") == "pieces of step 30");

  const Json config = read_json(temp / "out" / "config.json");
  CHECK(config["hidden_size"] == 8);
  CHECK(config["dtype"] == "bfloat16");
  CHECK(config["torch_dtype"] == "bfloat16");

  const Json state = read_json(temp / "out" / "state.json");
  CHECK(state["step"] == 30);
  CHECK(state["tokens"] == 30000);
  CHECK(state["seed"] == 7);
  CHECK(state["merged_from"].size() == 3);

  const Json merge = read_json(temp / "out" / "merge.json");
  CHECK(merge["method"] == "ema");
  CHECK(merge["alpha"] == 0.1);
  REQUIRE(merge["checkpoints"].size() == 3);
  CHECK(merge["checkpoints"][0]["weight"] == Approx(0.81));
  CHECK(merge["checkpoints"][0]["decay"].is_null());
  CHECK(merge["checkpoints"][1]["decay"] == Approx(0.19));
  CHECK(merge["checkpoints"][2]["decay"] == Approx(0.1));
  CHECK(merge["checkpoints"][2]["tokens"] == 30000);
  CHECK(merge["checkpoints"][2]["files"][0]["xxh3"] == hash_file(inputs[2] / "model.safetensors"));

  const std::uint64_t elements = 37 * 129 + 41 * 101 + 5;
  CHECK(report.tensors == 3);
  CHECK(report.elements == elements);
  CHECK(report.bytes_read == elements * 4 * 3);
  CHECK(report.bytes_written == elements * 2);
  CHECK(report.checkpoints[1].weight == Approx(0.09));
}

TEST_CASE("checkpoints are ordered by step unless the order is to be kept") {
  const TempDirectory temp;
  const std::vector<fs::path> sorted = write_three(temp, DType::f32);
  MergeOptions options{
      .inputs = {sorted[2], sorted[0], sorted[1]}, .output = temp / "out", .weights = {.method = MergeMethod::wma}};
  MergeReport report = merge_checkpoints(options);
  for (std::size_t i = 0; i < 3; ++i) CHECK(report.checkpoints[i].directory == sorted[i]);
  options.keep_order = true;
  report = merge_checkpoints(options);
  for (std::size_t i = 0; i < 3; ++i) CHECK(report.checkpoints[i].directory == options.inputs[i]);
  // The newest still gives tokens and state.
  CHECK(read_json(temp / "out" / "state.json")["step"] == 30);

  options.keep_order = false;
  options.weights = {.method = MergeMethod::custom, .custom = {0.5, 0.3, 0.2}};
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("not given oldest first"));
}

TEST_CASE("a merge of recorded updates equals a replayed decay") {
  // SGD at a constant rate on a noisy quadratic, in fp64. Replaying its recorded updates under a decay from the oldest
  // checkpoint must give the merge of the checkpoints under the decay's weights.
  const TempDirectory temp;
  constexpr std::size_t kSize = 64, kCount = 10;
  const std::vector<double> curvature = random_values(kSize, 90);
  std::vector<double> theta = random_values(kSize, 91);
  std::vector<std::vector<double>> path{theta};
  for (std::size_t j = 1; j < kCount; ++j) {
    const std::vector<double> noise = random_values(kSize, 100 + j);
    for (std::size_t k = 0; k < kSize; ++k) theta[k] -= 0.3 * ((1.0 + curvature[k]) * theta[k] + noise[k]);
    path.push_back(theta);
  }
  std::vector<fs::path> inputs;
  for (std::size_t j = 0; j < kCount; ++j) {
    inputs.push_back(temp / checkpoint_name(static_cast<std::int64_t>(j)));
    write_checkpoint(inputs.back(), {{"theta", {DType::f64, {kSize}, path[j]}}}, static_cast<std::int64_t>(j));
  }
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::one_minus_sqrt}) {
    const std::vector<double> decay = decay_factors(shape, kCount - 1, 0.1);
    std::vector<double> replayed = path.front();
    for (std::size_t j = 1; j < kCount; ++j)
      for (std::size_t k = 0; k < kSize; ++k) replayed[k] += decay[j - 1] * (path[j][k] - path[j - 1][k]);
    merge_checkpoints({.inputs = inputs,
                       .output = temp / "out",
                       .weights = {.method = MergeMethod::schedule, .shape = shape, .final_ratio = 0.1},
                       .dtype = MergeDtype::same});
    const std::vector<double> merged = read_values(temp / "out", "theta");
    for (std::size_t k = 0; k < kSize; ++k) CHECK(std::abs(merged[k] - replayed[k]) <= 1e-15);
    CHECK(std::abs(merged[0] - path.back()[0]) > 1e-4);  // not a trivial merge
  }
}

TEST_CASE("inputs that do not match are refused by name, and nothing is left behind") {
  const TempDirectory temp;
  write_hf_directory(temp / "checkpoint-1", random_model(DType::f32, 1));
  TestModel other = random_model(DType::f32, 2);
  std::string expected;
  SECTION("a missing tensor") {
    other.erase("lm_head.weight");
    expected = "tensor 'lm_head.weight' is missing";
  }
  SECTION("one tensor too many") {
    other["extra.weight"] = {DType::f32, {1}, {1.0}};
    expected = "tensor 'extra.weight' is not in";
  }
  SECTION("another shape") {
    other["model.norm.weight"] = {DType::f32, {6}, random_values(6, 1)};
    expected = "tensor 'model.norm.weight' has the shape [6], expected [5]";
  }
  SECTION("a weight that is not finite") {
    other["model.norm.weight"].values[3] = std::numeric_limits<double>::infinity();
    expected = "tensor 'model.norm.weight' holds inf at element 3";
  }
  SECTION("NaN") {
    other["model.embed_tokens.weight"].values[4000] = std::nan("");
    expected = "tensor 'model.embed_tokens.weight' holds nan at element 4000";
  }
  write_hf_directory(temp / "checkpoint-2", other);
  const MergeOptions options{
      .inputs = {temp / "checkpoint-1", temp / "checkpoint-2"}, .output = temp / "out", .weights = {}};
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring(expected));
  CHECK_THROWS_WITH(merge_checkpoints(options),
                    ContainsSubstring((temp / "checkpoint-2" / "model.safetensors").string()));
  check_only(temp.path(), {"checkpoint-1", "checkpoint-2"});
}

TEST_CASE("integer tensors, other models and a result that overflows are refused") {
  const TempDirectory temp;
  SECTION("integers") {
    fs::create_directories(temp / "a");
    SafetensorsWriter writer(temp / "a" / "model.safetensors", {{"mask", DType::i64, {1}}});
    writer.append(std::vector<std::byte>(8));
    writer.finish();
    write_text_atomic(temp / "a" / "config.json", test_config().dump());
    CHECK_THROWS_WITH(merge_checkpoints({.inputs = {temp / "a"}, .output = temp / "out", .weights = {}}),
                      ContainsSubstring("tensor 'mask' is i64"));
  }
  SECTION("configuration") {
    write_hf_directory(temp / "checkpoint-1", random_model(DType::f32, 1));
    write_hf_directory(temp / "checkpoint-2", random_model(DType::f32, 2));
    Json config = test_config();
    config["hidden_size"] = 16;
    write_text_atomic(temp / "checkpoint-2" / "config.json", config.dump());
    CHECK_THROWS_WITH(
        merge_checkpoints(
            {.inputs = {temp / "checkpoint-1", temp / "checkpoint-2"}, .output = temp / "out", .weights = {}}),
        ContainsSubstring("hidden_size is 16, expected 8"));
  }
  SECTION("overflow") {
    write_hf_directory(temp / "a", {{"x", {DType::f64, {1}, {1e60}}}});
    CHECK_THROWS_WITH(merge_checkpoints({.inputs = {temp / "a"}, .output = temp / "out", .weights = {}}),
                      ContainsSubstring("'x' overflows f32"));
  }
  CHECK_FALSE(fs::exists(temp / "out"));
}

TEST_CASE("torn inputs are refused") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  const fs::path model = inputs[1] / "model.safetensors";
  MergeOptions options{.inputs = inputs, .output = temp / "out", .weights = {}};
  SECTION("cut short") {
    fs::resize_file(model, fs::file_size(model) - 4);
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring(inputs[1].string()));
    options.verify = false;  // sizes are checked all the same
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring(inputs[1].string()));
  }
  SECTION("one byte changed") {
    std::fstream file(model, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-1, std::ios::end);
    file.put('\x3c');
    file.close();
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring(inputs[1].string()));
    options.verify = false;
    CHECK_NOTHROW(merge_checkpoints(options));
    CHECK(read_json(temp / "out" / "merge.json")["verified"] == false);
    fs::remove_all(temp / "out");
  }
  SECTION("no manifest") {
    fs::remove(inputs[1] / "MANIFEST.json");
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("no MANIFEST.json"));
  }
  SECTION("a shard that lacks what the index promises") {
    write_sharded_directory(temp / "sharded", random_model(DType::f32, 1));
    write_safetensors(temp / "sharded" / "model-00001-of-00002.safetensors", {{"other", {DType::f32, {1}, {1.0}}}});
    options.inputs = {temp / "sharded"};
    CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("'lm_head.weight' is not in"));
  }
  CHECK_FALSE(fs::exists(temp / "out"));
}

TEST_CASE("an output is never taken from something else") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  MergeOptions options{.inputs = inputs, .output = inputs[2], .weights = {}};
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("both input and output"));
  options.inputs = {inputs[0], inputs[1]};
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("no earlier merge"));
  CHECK(fs::exists(inputs[2] / "state.json"));
  options.inputs = {inputs[0], temp / "." / "step_00000010"};
  options.output = temp / "out";
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("given twice"));
  options.inputs = {inputs[0], temp / "nowhere"};
  CHECK_THROWS_WITH(merge_checkpoints(options), ContainsSubstring("nowhere"));
  CHECK_FALSE(fs::exists(temp / "out"));
}

TEST_CASE("a failed merge leaves the earlier one standing") {
  const TempDirectory temp;
  const std::vector<fs::path> inputs = write_three(temp, DType::f32);
  MergeOptions options{.inputs = {inputs[0], inputs[1]}, .output = temp / "out", .weights = {}};
  merge_checkpoints(options);
  const std::string before = hash_file(temp / "out" / "model.safetensors");
  TestModel bad = random_model(DType::f32, 4);
  bad["model.norm.weight"].values[0] = std::nan("");
  write_checkpoint(temp / "step_00000040", bad, 40);
  options.inputs.push_back(temp / "step_00000040");
  CHECK_THROWS_AS(merge_checkpoints(options), Error);
  CHECK(hash_file(temp / "out" / "model.safetensors") == before);
  check_only(temp.path(), {"out", "step_00000010", "step_00000020", "step_00000030", "step_00000040"});
}

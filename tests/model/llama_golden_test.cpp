// Logits, loss and every gradient against transformers, see scripts/golden/llama_golden.py.
#include <cmath>
#include <cstring>

#include "catch.h"
#include "io/safetensors.h"
#include "model/llama_run.h"

namespace kiln {
namespace {

constexpr double kTolerance = 1e-5;

const SafetensorEntry& entry_of(const SafetensorsReader& file, const std::string& name) {
  const SafetensorEntry* entry = file.find(name);
  if (entry == nullptr) fail(ExitCode::data, "{}: no tensor '{}'", file.path().string(), name);
  return *entry;
}

std::vector<float> floats(const SafetensorsReader& file, const std::string& name, std::int64_t count) {
  const SafetensorEntry& entry = entry_of(file, name);
  REQUIRE(entry.end - entry.begin == static_cast<std::uint64_t>(count) * sizeof(float));
  std::vector<float> out(static_cast<std::size_t>(count));
  file.read_floats(entry, 0, out);
  return out;
}

std::vector<std::int32_t> integers(const SafetensorsReader& file, const std::string& name) {
  const std::span<const std::byte> bytes = file.bytes(entry_of(file, name));
  std::vector<std::int32_t> out(bytes.size() / sizeof(std::int32_t));
  std::memcpy(out.data(), bytes.data(), bytes.size());
  return out;
}

/// Largest absolute error over the largest absolute value; NaN when anything is.
double relative_error(std::span<const float> found, std::span<const float> expected) {
  double error = 0, largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    if (std::isnan(difference)) return difference;
    error = std::max(error, difference);
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
  }
  return error / largest;
}

void compare_with_transformers(const std::string& name, bool tied) {
  const std::filesystem::path directory = std::filesystem::path(KILN_GOLDEN_DIR) / name;
  const std::filesystem::path config_file = directory / "config.json";
  const LlamaConfig config = from_hf_config(read_json(config_file), config_file.string());
  REQUIRE(config.tied == tied);

  const ModelWeights weights(config, DType::f32);
  const std::vector<Parameter>& parameters = weights.table().parameters;
  const SafetensorsReader model(directory / "model.safetensors"), golden(directory / "golden.safetensors");
  REQUIRE(model.entries().size() == parameters.size());
  for (const Parameter& parameter : parameters)
    model.read_floats(entry_of(model, parameter.name), 0, weights.view(parameter).span<float>());

  const SafetensorEntry& tokens_entry = entry_of(golden, "tokens");
  const BatchShape shape{.sequences = tokens_entry.shape.at(0), .seq_len = tokens_entry.shape.at(1)};
  const std::vector<std::int32_t> tokens = integers(golden, "tokens"), targets = integers(golden, "targets");

  LlamaRun forward(weights, DType::f32, shape, LlamaOutput::logits);
  forward.set_batch(tokens, targets);
  forward.run();
  CHECK(relative_error(forward.logits().span<float>(), floats(golden, "logits", shape.tokens() * config.vocab)) <=
        kTolerance);

  const double loss = static_cast<double>(floats(golden, "loss", 1).front());
  LlamaRun evaluated(weights, DType::f32, shape, LlamaOutput::losses);
  evaluated.set_batch(tokens, targets);
  evaluated.run();
  CHECK(std::abs(evaluated.loss() - loss) <= kTolerance * loss);

  LlamaRun trained(weights, DType::f32, shape, LlamaOutput::losses_and_gradients);
  trained.set_batch(tokens, targets);
  trained.run();
  CHECK(std::abs(trained.loss() - loss) <= kTolerance * loss);
  for (const Parameter& parameter : parameters) {
    INFO(parameter.name);
    const std::vector<float> expected = floats(golden, "grad." + parameter.name, parameter.shape.numel());
    CHECK(relative_error(trained.gradient(parameter).span<float>(), expected) <= kTolerance);
  }
}

TEST_CASE("an untied LLaMA with grouped queries agrees with transformers") {
  compare_with_transformers("llama_gqa", false);
}

TEST_CASE("a tied LLaMA agrees with transformers") { compare_with_transformers("llama_tied", true); }

}  // namespace
}  // namespace kiln

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "base/error.h"
#include "catch.h"
#include "core/parallel.h"
#include "model/llama_run.h"

namespace kiln {
namespace {

LlamaConfig tiny_config() {
  LlamaConfig config;
  config.vocab = 13;
  config.hidden = 12;
  config.ffn = 20;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 4;
  config.layers = 2;
  config.init_std = 0.3;
  return config;
}

std::int64_t elements(const ParameterTable& table) {
  return std::accumulate(table.parameters.begin(), table.parameters.end(), std::int64_t{0},
                         [](std::int64_t sum, const Parameter& p) { return sum + p.shape.numel(); });
}

void check_gradients(const LlamaConfig& config, Recomputation recompute = {}) {
  const ModelWeights weights(config, DType::f64);
  initialise(weights, 7);
  const BatchShape shape{.sequences = 2, .seq_len = 9};
  std::vector<std::int32_t> tokens, targets;
  for (std::int32_t i = 0; i < shape.tokens(); ++i) {
    tokens.push_back((5 * i + 3) % 13);
    targets.push_back(i % 7 == 4 ? -100 : (3 * i + 1) % 13);
  }
  LlamaRun trained(weights, DType::f64, shape, LlamaOutput::losses_and_gradients, recompute);
  trained.set_batch(tokens, targets);
  trained.run();
  LlamaRun forward(weights, DType::f64, shape, LlamaOutput::losses);
  forward.set_batch(tokens, targets);

  constexpr double kStep = 1e-5;
  constexpr std::size_t kSamples = 12;
  for (const Parameter& parameter : weights.table().parameters) {
    INFO(parameter.name);
    const std::span<double> values = weights.view(parameter).span<double>();
    const std::span<const double> gradient = trained.gradient(parameter).span<double>();
    double error = 0, norm = 0;
    for (std::size_t s = 0; s < kSamples; ++s) {
      const std::size_t i = (s * values.size() + values.size() / 2) / kSamples;
      const double value = values[i];
      auto loss_at = [&](double moved) {
        values[i] = moved;
        forward.run();
        return forward.loss();
      };
      const double difference = (loss_at(value + kStep) - loss_at(value - kStep)) / (2 * kStep);
      values[i] = value;
      error += std::pow(gradient[i] - difference, 2);
      norm += std::pow(difference, 2);
    }
    REQUIRE(norm > 0);
    CHECK(std::sqrt(error / norm) <= 1e-6);
  }
}

TEST_CASE("parameters of a padded layout know their own sizes") {
  const LlamaConfig config = tiny_config();
  const ParameterTable own = llama_parameters(config, DType::f32),
                       padded = llama_parameters(config, StorageLayout(DType::bf16, 64));
  std::size_t longer = 0;
  for (std::size_t p = 0; p < own.parameters.size(); ++p) {
    CHECK(own.parameters[p].own_shape() == own.parameters[p].shape);
    CHECK(padded.parameters[p].own_shape() == own.parameters[p].shape);
    longer += padded.parameters[p].shape != own.parameters[p].shape ? 1 : 0;
  }
  CHECK(longer >= 4);  // embedding, gate, up and down
}

TEST_CASE("gradients of a two-layer LLaMA with grouped queries match central differences") {
  check_gradients(tiny_config());
}

TEST_CASE("gradients of a tied LLaMA match central differences") {
  LlamaConfig config = tiny_config();
  config.tied = true;
  check_gradients(config);
}

bool same_bits(const Tensor& a, const Tensor& b) { return std::memcmp(a.data, b.data, a.bytes()) == 0; }

TEST_CASE("recomputation changes no bit of the loss or of any gradient") {
  for (const bool tied : {false, true}) {
    LlamaConfig config = tiny_config();
    config.tied = tied;
    config.layers = 3;
    const ModelWeights weights(config, DType::f32);
    initialise(weights, 5);
    const BatchShape shape{.sequences = 3, .seq_len = 11};
    std::vector<std::int32_t> tokens, targets;
    for (std::int32_t i = 0; i < shape.tokens(); ++i) {
      tokens.push_back((5 * i + 3) % 13);
      targets.push_back(i % 7 == 4 ? -100 : (3 * i + 1) % 13);
    }
    auto run = [&](Recomputation recompute) {
      auto model = std::make_unique<LlamaRun>(weights, DType::f32, shape, LlamaOutput::losses_and_gradients, recompute);
      model->set_batch(tokens, targets);
      model->run();
      return model;
    };
    const auto none = run(Recompute::none);
    for (const Recomputation recompute : {Recomputation(Recompute::norms), Recomputation(Recompute::norms, 2),
                                          Recomputation(Recompute::block), Recomputation(Recompute::block, 1)}) {
      INFO(to_string(recompute) << (tied ? ", tied" : ""));
      const auto again = run(recompute);
      CHECK(same_bits(none->losses(), again->losses()));
      for (const Parameter& parameter : weights.table().parameters) {
        INFO(parameter.name);
        CHECK(same_bits(none->gradient(parameter), again->gradient(parameter)));
      }
    }
  }
}

TEST_CASE("gradients of recomputed layers match central differences") {
  for (const Recompute recompute : {Recompute::norms, Recompute::block}) check_gradients(tiny_config(), recompute);
  LlamaConfig three = tiny_config();
  three.layers = 3;
  check_gradients(three, {Recompute::block, 2});
}

/// Names of the nodes that run after the classifier, in order.
std::vector<std::string> backward_ops(Recompute recompute) {
  Plan plan;
  LlamaConfig config = tiny_config();
  config.layers = 2;
  const LlamaValues values = record_llama(plan, config, DType::f32, {.sequences = 2, .seq_len = 8},
                                          LlamaOutput::losses_and_gradients, 8, recompute);
  const std::size_t forward = plan.nodes().size();
  plan.backward(values.losses);
  std::vector<std::string> names;
  for (std::size_t n = forward; n < plan.nodes().size(); ++n) names.emplace_back(plan.nodes()[n].op->name());
  return names;
}

TEST_CASE("recomputed nodes stand in forward order right before the gradients of their layer") {
  const std::vector<std::string> none = backward_ops(Recompute::none), norms = backward_ops(Recompute::norms),
                                 block = backward_ops(Recompute::block);
  CHECK(norms.size() == none.size() + 2 * 3);
  // Not the down projection, whose result no gradient reads, and no whole norm where its 1/rms stayed.
  const std::vector<std::string> again{"rms_scale", "linear",       "rope",   "attention",
                                       "linear",    "add_rms_norm", "linear", "swiglu"};
  CHECK(block.size() == none.size() + 2 * again.size());
  const auto first = std::search(block.begin(), block.end(), again.begin(), again.end());
  REQUIRE(first != block.end());
  CHECK(first == block.begin() + 1);  // after the final norm's gradient
  CHECK(std::search(first + 1, block.end(), again.begin(), again.end()) != block.end());
  std::vector<std::string> rest;
  for (const std::string& name : block)
    if (std::ranges::find(again, name) == again.end()) rest.push_back(name);
  CHECK(rest == none);  // the gradients themselves are the same, in the same order
}

TEST_CASE("recomputation leaves of a layer what its policy says") {
  LlamaConfig config = tiny_config();
  config.hidden = 48;
  config.ffn = 128;
  config.head_dim = 12;
  const BatchShape shape{.sequences = 4, .seq_len = 64};
  auto arena = [&](Recomputation recompute, std::int64_t layers) {
    config.layers = layers;
    Plan plan;
    const LlamaValues values =
        record_llama(plan, config, DType::f32, shape, LlamaOutput::losses_and_gradients, shape.seq_len, recompute);
    plan.backward(values.losses);
    return static_cast<double>(pack(plan, 1).arena_bytes);
  };
  // Bytes that one more layer adds, over those of a token's activation element.
  const double unit = 4.0 * static_cast<double>(shape.tokens());
  auto layer = [&](Recompute recompute) { return (arena(recompute, 12) - arena(recompute, 6)) / 6 / unit; };
  const auto c = static_cast<double>(config.hidden), f = static_cast<double>(config.ffn);
  const double none = layer(Recompute::none), norms = layer(Recompute::norms), block = layer(Recompute::block);
  CHECK(none - norms == Approx(2 * c + f).epsilon(0.01));
  CHECK(block >= c);  // the residual input and 1/rms; gradients of parameters come on top in all three
  CHECK(none - block == Approx(3 * c + 2 * 48 + 2 * 24 + 4 + 3 * f + 1).epsilon(0.01));

  // Each of the first layers takes off what all layers together take off on the mean.
  const double all = arena(Recompute::norms, 12);
  for (const std::int64_t first : {1, 4, 8})
    CHECK((all - arena({Recompute::block, first}, 12)) / unit ==
          Approx(static_cast<double>(first) * (norms - block)).epsilon(0.01));
  CHECK(arena({Recompute::norms, 12}, 12) == all);
  CHECK(to_string(Recomputation(Recompute::block, 4)) == "block of 4 layers");
}

TEST_CASE("the parameter table holds every element once") {
  for (const bool tied : {false, true}) {
    LlamaConfig config = tiny_config();
    config.tied = tied;
    const ParameterTable table = llama_parameters(config, DType::f32);
    CHECK(elements(table) == config.parameter_count());
    std::int64_t stored = 0;
    for (const Storage& storage : table.storages) stored += storage.spec.shape.numel();
    CHECK(stored == config.parameter_count());
    std::set<std::string> names;
    std::int64_t low_rank = 0;
    for (const Parameter& parameter : table.parameters) {
      names.insert(parameter.name);
      CHECK(parameter.decay == (parameter.shape.rank() == 2));
      CHECK(parameter.low_rank == (parameter.name.find("_proj.") != std::string::npos));
      if (parameter.low_rank) {
        CHECK(parameter.low_rank_index == low_rank++);
        CHECK(parameter.low_rank_count == 7 * config.layers);
      }
    }
    CHECK(names.size() == table.parameters.size());
    CHECK(names.contains("lm_head.weight") == !tied);
    CHECK(table.parameters.front().name == "model.embed_tokens.weight");
  }
}

TEST_CASE("presets have the sizes of the GaLore and Fira papers") {
  // Exact counts behind the published 58M, 134M, 368M, 1339M and 6738M, as transformers counts them; 9m is ours.
  const std::vector<std::pair<std::string_view, std::int64_t>> published{
      {"llama_9m", 8995968},     {"llama_60m", 58073600},  {"llama_130m", 134105856},
      {"llama_350m", 367969280}, {"llama_1b", 1339082752}, {"llama_7b", 6738415616}};
  CHECK(llama_preset_names().size() == published.size());
  for (const auto& [name, count] : published) {
    INFO(name);
    const LlamaConfig config = llama_preset(name);
    config.validate();
    CHECK(config.hidden == config.heads * config.head_dim);
    CHECK(config.parameter_count() == count);
    CHECK(elements(llama_parameters(config, DType::f32)) == count);
  }
  CHECK_THROWS_WITH(llama_preset("llama_2m"), ContainsSubstring("llama_2m") && ContainsSubstring("llama_60m"));
}

TEST_CASE("initial weights depend on the seed and on nothing else") {
  const ModelWeights a(tiny_config(), DType::f32), b(tiny_config(), DType::f32), other(tiny_config(), DType::f32);
  const int threads = thread_count();
  initialise(a, 3);
  set_thread_count(1);
  initialise(b, 3);
  set_thread_count(threads);
  initialise(other, 4);
  for (std::size_t p = 0; p < a.table().parameters.size(); ++p) {
    const Parameter& parameter = a.table().parameters[p];
    INFO(parameter.name);
    const Tensor first = a.view(parameter), second = b.view(parameter), third = other.view(parameter);
    CHECK(std::memcmp(first.data, second.data, first.bytes()) == 0);
    if (parameter.shape.rank() == 1) {
      for (const float value : first.span<float>()) CHECK(value == 1.0F);
    } else {
      CHECK(std::memcmp(first.data, third.data, first.bytes()) != 0);
    }
  }
}

TEST_CASE("initial weights have the configured spread") {
  LlamaConfig config = tiny_config();
  config.vocab = 5000;
  config.init_std = 0.02;
  const ModelWeights weights(config, DType::f32);
  initialise(weights, 1);
  const std::span<const float> embedding = weights.view(weights.table().parameters.front()).span<float>();
  double sum = 0, squares = 0;
  for (const float value : embedding) {
    sum += static_cast<double>(value);
    squares += std::pow(static_cast<double>(value), 2);
  }
  const auto count = static_cast<double>(embedding.size());
  CHECK(std::abs(sum / count) < 5 * config.init_std / std::sqrt(count));
  CHECK(std::sqrt(squares / count) == Approx(config.init_std).epsilon(0.02));
}

TEST_CASE("a Hugging Face config comes back as it was") {
  LlamaConfig config = tiny_config();
  config.max_positions = 4096;
  config.tied = true;
  config.rope_base = 500000;
  config.rms_eps = 1e-5;
  config.bos = 5;
  config.eos = 6;
  const Json json = to_hf_config(config, "bfloat16");
  CHECK(json["dtype"] == "bfloat16");
  CHECK(json["torch_dtype"] == "bfloat16");
  CHECK(from_hf_config(json, "config.json") == config);
}

TEST_CASE("a Hugging Face config of either transformers version is read") {
  const LlamaConfig config = tiny_config();
  Json old_style = to_hf_config(config, "float32");
  old_style.erase("rope_parameters");
  old_style["rope_theta"] = 20000.0;
  old_style["rope_scaling"] = nullptr;
  CHECK(from_hf_config(old_style, "config.json").rope_base == 20000);
  Json new_style = to_hf_config(config, "float32");
  new_style.erase("rope_theta");
  new_style["rope_parameters"]["rope_theta"] = 30000.0;
  CHECK(from_hf_config(new_style, "config.json").rope_base == 30000);

  Json short_file = to_hf_config(llama_preset("llama_60m"), "float32");
  for (const char* key : {"num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "tie_word_embeddings"})
    short_file.erase(key);
  CHECK(from_hf_config(short_file, "config.json") == llama_preset("llama_60m"));
}

TEST_CASE("a Hugging Face config that kiln cannot run is refused by key") {
  auto refused = [](const char* key, const Json& value, const std::string& expected) {
    INFO(key << " = " << value.dump());
    Json json = to_hf_config(tiny_config(), "float32");
    if (value.is_discarded())
      json.erase(key);
    else
      json[key] = value;
    try {
      from_hf_config(json, "dir/config.json");
      FAIL("accepted");
    } catch (const Error& error) {
      CHECK(error.code() == ExitCode::data);
      CHECK_THAT(error.what(), ContainsSubstring("dir/config.json") && ContainsSubstring(expected));
    }
  };
  const Json missing(nlohmann::json::value_t::discarded);
  refused("vocab_size", missing, "vocab_size");
  refused("num_hidden_layers", missing, "num_hidden_layers");
  refused("hidden_size", "wide", "hidden_size");
  refused("architectures", Json::array({"MistralForCausalLM"}), "MistralForCausalLM");
  refused("attention_bias", true, "attention_bias");
  refused("mlp_bias", true, "mlp_bias");
  refused("hidden_act", "gelu", "hidden_act");
  refused("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}, "llama3");
  refused("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}, "linear");
  refused("rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 10000.0}}, "yarn");
  refused("num_attention_heads", 0, "num_attention_heads");
  refused("num_key_value_heads", 3, "kv_heads");
  refused("head_dim", 5, "head_dim");
}

TEST_CASE("sizes that do not fit together are refused by key") {
  LlamaConfig config = tiny_config();
  config.kv_heads = 3;
  CHECK_THROWS_WITH(config.validate(), ContainsSubstring("model.kv_heads 3"));
  config = tiny_config();
  config.ffn = 0;
  CHECK_THROWS_WITH(config.validate(), ContainsSubstring("model.ffn"));
  CHECK_THROWS_AS(ModelWeights(config, DType::f32), Error);
}

}  // namespace
}  // namespace kiln

#include "model/llama_config.h"

#include <array>

#include "base/error.h"

namespace kiln {
namespace {

struct Preset {
  std::string_view name;
  std::int64_t hidden, ffn, heads, layers;
};
constexpr std::array<Preset, 6> kPresets{{{"llama_9m", 128, 352, 4, 4},
                                          {"llama_60m", 512, 1376, 8, 8},
                                          {"llama_130m", 768, 2048, 12, 12},
                                          {"llama_350m", 1024, 2736, 16, 24},
                                          {"llama_1b", 2048, 5461, 32, 24},
                                          {"llama_7b", 4096, 11008, 32, 32}}};

/// A key of config.json, with its default when the file may leave it out.
template <typename T>
T get(const Json& json, const char* key, std::string_view file) {
  const auto found = json.find(key);
  if (found == json.end()) fail(ExitCode::data, "{}: key '{}' is missing, expected in a LLaMA config.json", file, key);
  try {
    return found->get<T>();
  } catch (const nlohmann::json::exception&) {
    fail(ExitCode::data, "{}: key '{}' holds {}, which has the wrong type", file, key, found->dump());
  }
}
template <typename T>
T get_or(const Json& json, const char* key, std::string_view file, T otherwise) {
  return json.contains(key) && !json[key].is_null() ? get<T>(json, key, file) : otherwise;
}

void refuse_unsupported(const Json& json, std::string_view file) {
  auto refuse = [&](std::string_view what) {
    fail(ExitCode::data, "{}: {} is not supported; kiln reads plain LLaMA models", file, what);
  };
  const auto architectures = get_or<std::vector<std::string>>(json, "architectures", file, {"LlamaForCausalLM"});
  if (architectures != std::vector<std::string>{"LlamaForCausalLM"})
    refuse(fmt::format("architecture '{}'", architectures.empty() ? "" : architectures.front()));
  if (get_or(json, "attention_bias", file, false)) refuse("attention_bias");
  if (get_or(json, "mlp_bias", file, false)) refuse("mlp_bias");
  if (get_or<std::string>(json, "hidden_act", file, "silu") != "silu") refuse("hidden_act other than silu");
  if (json.contains("rope_scaling") && json["rope_scaling"].is_object()) {
    const Json& scaling = json["rope_scaling"];
    const auto type =
        get_or<std::string>(scaling, "rope_type", file, get_or<std::string>(scaling, "type", file, "default"));
    if (type != "default") refuse(fmt::format("rope_scaling of type '{}'", type));
  }
}

double rope_base_of(const Json& json, std::string_view file) {
  if (json.contains("rope_parameters") && json["rope_parameters"].is_object()) {
    const Json& rope = json["rope_parameters"];
    const auto type = get_or<std::string>(rope, "rope_type", file, "default");
    if (type != "default") fail(ExitCode::data, "{}: rope_parameters of type '{}' are not supported", file, type);
    if (rope.contains("rope_theta")) return get<double>(rope, "rope_theta", file);
  }
  return get_or(json, "rope_theta", file, 10000.0);
}

}  // namespace

void LlamaConfig::validate() const {
  auto positive = [](std::string_view key, std::int64_t value) {
    check(value >= 1, "model.{}: {}, expected at least 1", key, value);
  };
  positive("vocab", vocab);
  positive("hidden", hidden);
  positive("ffn", ffn);
  positive("heads", heads);
  positive("kv_heads", kv_heads);
  positive("layers", layers);
  positive("head_dim", head_dim);
  check(heads % kv_heads == 0, "model.heads: {}, expected a multiple of model.kv_heads {}", heads, kv_heads);
  check(head_dim % 2 == 0, "model.head_dim: {}, expected an even number for RoPE", head_dim);
  check(rope_base > 1, "model.rope_base: {}, expected more than 1", rope_base);
  check(rms_eps > 0, "model.rms_eps: {}, expected a positive number", rms_eps);
}

std::int64_t LlamaConfig::parameter_count() const {
  const std::int64_t attention = hidden * head_dim * (2 * heads + 2 * kv_heads);
  const std::int64_t layer = attention + 3 * hidden * ffn + 2 * hidden;
  return (tied ? 1 : 2) * vocab * hidden + layers * layer + hidden;
}

double LlamaConfig::flops_per_token(std::int64_t seq_len) const {
  const std::int64_t attention = hidden * head_dim * (2 * heads + 2 * kv_heads);
  const auto matmul = static_cast<double>(layers * (attention + 3 * hidden * ffn) + vocab * hidden);
  return 6.0 * matmul + 6.0 * static_cast<double>(layers * heads * head_dim * seq_len);
}

LlamaConfig llama_preset(std::string_view name) {
  for (const Preset& preset : kPresets) {
    if (preset.name != name) continue;
    LlamaConfig config;
    config.hidden = preset.hidden;
    config.ffn = preset.ffn;
    config.heads = config.kv_heads = preset.heads;
    config.layers = preset.layers;
    config.head_dim = preset.hidden / preset.heads;
    return config;
  }
  std::string known;
  for (const Preset& preset : kPresets) known += fmt::format("{}{}", known.empty() ? "" : ", ", preset.name);
  fail(ExitCode::usage, "model.preset: '{}' is not known; choose one of {}", name, known);
}

std::vector<std::string_view> llama_preset_names() {
  std::vector<std::string_view> names;
  for (const Preset& preset : kPresets) names.push_back(preset.name);
  return names;
}

Json to_hf_config(const LlamaConfig& c, std::string_view dtype) {
  Json json;
  json["architectures"] = {"LlamaForCausalLM"};
  json["model_type"] = "llama";
  json["attention_bias"] = false;
  json["attention_dropout"] = 0.0;
  json["bos_token_id"] = c.bos;
  json["eos_token_id"] = c.eos;
  json["head_dim"] = c.head_dim;
  json["hidden_act"] = "silu";
  json["hidden_size"] = c.hidden;
  json["initializer_range"] = c.init_std;
  json["intermediate_size"] = c.ffn;
  json["max_position_embeddings"] = c.max_positions;
  json["mlp_bias"] = false;
  json["num_attention_heads"] = c.heads;
  json["num_hidden_layers"] = c.layers;
  json["num_key_value_heads"] = c.kv_heads;
  json["rms_norm_eps"] = c.rms_eps;
  json["rope_theta"] = c.rope_base;
  json["rope_parameters"] = {{"rope_theta", c.rope_base}, {"rope_type", "default"}};
  json["tie_word_embeddings"] = c.tied;
  json["dtype"] = dtype;
  json["torch_dtype"] = dtype;
  json["use_cache"] = true;
  json["vocab_size"] = c.vocab;
  return json;
}

LlamaConfig from_hf_config(const Json& json, std::string_view file) {
  refuse_unsupported(json, file);
  LlamaConfig c;
  c.vocab = get<std::int64_t>(json, "vocab_size", file);
  c.hidden = get<std::int64_t>(json, "hidden_size", file);
  c.ffn = get<std::int64_t>(json, "intermediate_size", file);
  c.heads = get<std::int64_t>(json, "num_attention_heads", file);
  c.kv_heads = get_or(json, "num_key_value_heads", file, c.heads);
  c.layers = get<std::int64_t>(json, "num_hidden_layers", file);
  if (c.heads < 1) fail(ExitCode::data, "{}: num_attention_heads {}, expected at least 1", file, c.heads);
  c.head_dim = get_or(json, "head_dim", file, c.hidden / c.heads);
  c.max_positions = get_or<std::int64_t>(json, "max_position_embeddings", file, 2048);
  c.tied = get_or(json, "tie_word_embeddings", file, false);
  c.rope_base = rope_base_of(json, file);
  c.rms_eps = get_or(json, "rms_norm_eps", file, 1e-6);
  c.init_std = get_or(json, "initializer_range", file, 0.02);
  c.bos = get_or<std::int64_t>(json, "bos_token_id", file, 1);
  c.eos = get_or<std::int64_t>(json, "eos_token_id", file, 2);
  try {
    c.validate();
  } catch (const Error& e) {
    fail(ExitCode::data, "{}: {}", file, e.what());
  }
  return c;
}

}  // namespace kiln

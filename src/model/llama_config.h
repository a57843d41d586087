#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace kiln {

/// Shape of a LLaMA (Touvron et al. 2023, arXiv:2302.13971; GQA as in Llama 2). Sizes in elements.
struct LlamaConfig {
  std::int64_t vocab = 32000, hidden = 512, ffn = 1376, heads = 8, kv_heads = 8, layers = 8;
  std::int64_t head_dim = 64;
  std::int64_t max_positions = 2048;
  bool tied = false;  // the head shares the embedding's weight
  double rope_base = 10000.0, rms_eps = 1e-6, init_std = 0.02;
  std::int64_t bos = 1, eos = 2;

  /// Throws a usage Error naming the key when sizes do not fit together.
  void validate() const;
  /// Elements over all parameters, the head counted once more when untied.
  std::int64_t parameter_count() const;
  /// Training FLOPs per token, forward and backward: 6 * (matmul weights) + 6 * layers * hidden * seq (causal half of
  /// 12 L C T); the embedding look-up is not counted. The definition of MFU in this project.
  double flops_per_token(std::int64_t seq_len) const;

  bool operator==(const LlamaConfig&) const = default;
};

/// "llama_60m" and so on; a usage Error lists the presets. Sizes are those of the GaLore and Fira papers.
LlamaConfig llama_preset(std::string_view name);
std::vector<std::string_view> llama_preset_names();

/// Hugging Face `config.json`, as `transformers` 4 and 5 read it (both rope_theta and rope_parameters, dtype and
/// torch_dtype); `dtype` is "float32" or "bfloat16".
Json to_hf_config(const LlamaConfig& config, std::string_view dtype);
/// Reads such a file; a data Error names the key that is missing, of another architecture or unsupported
/// (attention bias, scaled RoPE, another activation).
LlamaConfig from_hf_config(const Json& json, std::string_view file);

}  // namespace kiln

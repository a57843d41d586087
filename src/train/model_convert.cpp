#include "train/model_convert.h"

#include <array>

#include "train/model_files.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

constexpr std::array<const char*, 6> kTokenizerFiles{"tokenizer.model",       "tokenizer.json",
                                                     "tokenizer_config.json", "special_tokens_map.json",
                                                     "added_tokens.json",     "chat_template.jinja"};

}  // namespace

ConvertedModel convert_model(const fs::path& from, const fs::path& out, DType dtype) {
  check(!fs::exists(out) || (fs::is_directory(out) && fs::is_empty(out)),
        "--out {}: exists and is not an empty directory; choose another one or remove it", out.string());
  const ModelWeights weights = load_model(from);
  CheckpointWriter writer(out);
  write_model(writer, weights, dtype, {});
  ConvertedModel converted{.parameters = weights.config().parameter_count(), .tokenizer_files = {}};
  for (const char* name : kTokenizerFiles) {
    if (!fs::is_regular_file(from / name)) continue;
    writer.copy_file(from / name, name);
    converted.tokenizer_files.emplace_back(name);
  }
  writer.commit();
  return converted;
}

DType parse_weight_dtype(const std::string& name, const std::string& option) {
  if (name == "fp32") return DType::f32;
  if (name == "bf16") return DType::bf16;
  fail(ExitCode::usage, "{} '{}': expected fp32 or bf16", option, name);
}

}  // namespace kiln

#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace kiln {

/// What convert_model wrote.
struct ConvertedModel {
  std::int64_t parameters = 0;
  std::vector<std::string> tokenizer_files;  // copied as they stand
};

/// Reads the model directory `from` (load_model) and writes it to `out` in `dtype` (f32 or bf16): model.safetensors,
/// config.json, generation_config.json, the tokenizer files that `from` holds, and a manifest; no optimizer state.
/// Hugging Face's and kiln's directories are read and written alike. The errors of load_model; a usage Error when `out`
/// holds something already, so that nothing is overwritten.
ConvertedModel convert_model(const std::filesystem::path& from, const std::filesystem::path& out, DType dtype);

/// "fp32" or "bf16" as the dtype of weights; a usage Error naming `option` otherwise.
DType parse_weight_dtype(const std::string& name, const std::string& option);

}  // namespace kiln

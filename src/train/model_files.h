#pragma once
#include <filesystem>

#include "io/checkpoint.h"
#include "model/llama.h"

namespace kiln {

/// Reads a model directory, written by kiln or by `transformers` (`config.json`; `model.safetensors` or its shards;
/// f32, f64, bf16 or f16), into f32 weights. A data Error names the file and the tensor that is missing, unexpected or
/// of another shape; a checkpoint of kiln's whose manifest does not match is refused.
ModelWeights load_model(const std::filesystem::path& directory);

/// Fills existing weights from the model files of a directory; the errors of load_model.
void load_weights(const std::filesystem::path& directory, const ModelWeights& weights);

/// Writes `model.safetensors`, `config.json` and `generation_config.json`, and copies `tokenizer` (a SentencePiece
/// model) as `tokenizer.model` with its `tokenizer_config.json` when given.
void write_model(CheckpointWriter& writer, const ModelWeights& weights, DType dtype,
                 const std::filesystem::path& tokenizer);

}  // namespace kiln

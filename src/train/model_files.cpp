#include "train/model_files.h"

#include <set>

#include "core/parallel.h"
#include "io/safetensors.h"

namespace kiln {
namespace {

/// The fp32 original, or rounded to bf16, in pieces of a fixed size.
void append_weights(SafetensorsWriter& out, const Tensor& tensor, DType dtype) {
  if (dtype == DType::f32) {
    out.append({static_cast<const std::byte*>(tensor.data), tensor.bytes()});
    return;
  }
  constexpr std::size_t kPiece = 1 << 16;
  std::vector<bfloat16> piece;
  const std::span<const float> values = tensor.span<float>();
  for (std::size_t first = 0; first < values.size(); first += kPiece) {
    const auto part = values.subspan(first, std::min(kPiece, values.size() - first));
    piece.resize(part.size());
    std::transform(part.begin(), part.end(), piece.begin(), to_bfloat16);
    out.append(std::as_bytes(std::span(piece)));
  }
}

void read_entry(const SafetensorsReader& file, const SafetensorEntry& entry, const Parameter& parameter,
                const Tensor& target) {
  if (entry.shape != parameter.shape.sizes())
    fail(ExitCode::data, "{}: tensor '{}' has shape [{}], expected {} from config.json", file.path().string(),
         entry.name, fmt::join(entry.shape, ","), parameter.shape.str());
  const std::span<float> out = target.span<float>();
  constexpr std::int64_t kPiece = 1 << 18;
  parallel_for(target.numel(), kPiece, [&](std::int64_t begin, std::int64_t end) {
    file.read_floats(entry, static_cast<std::uint64_t>(begin),
                     out.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
  });
}

}  // namespace

void load_weights(const std::filesystem::path& directory, const ModelWeights& weights) {
  std::map<std::string, const Parameter*> missing;
  for (const Parameter& parameter : weights.table().parameters) missing[parameter.name] = &parameter;
  for (const std::filesystem::path& path : model_files(directory)) {
    const SafetensorsReader file(path);
    for (const SafetensorEntry& entry : file.entries()) {
      // A tied model may store its head as well; buffers of old exports carry no weight.
      if (weights.config().tied && entry.name == "lm_head.weight") continue;
      if (entry.name.ends_with(".rotary_emb.inv_freq")) continue;
      const auto found = missing.find(entry.name);
      if (found == missing.end())
        fail(ExitCode::data, "{}: tensor '{}' is not part of the model that config.json describes", path.string(),
             entry.name);
      read_entry(file, entry, *found->second, weights.view(*found->second));
      missing.erase(found);
    }
  }
  if (!missing.empty())
    fail(ExitCode::data, "{}: tensor '{}' is missing ({} in all); the files do not belong to config.json",
         directory.string(), missing.begin()->first, missing.size());
}

ModelWeights load_model(const std::filesystem::path& directory) {
  if (!std::filesystem::is_directory(directory))
    fail(ExitCode::data, "{}: no such model directory; give one that holds config.json and model.safetensors",
         directory.string());
  if (std::filesystem::exists(directory / "MANIFEST.json"))
    if (const auto fault = checkpoint_fault(directory, ManifestCheck::sizes))
      fail(ExitCode::data, "{}: the checkpoint is torn ({}); use another one", directory.string(), *fault);
  const std::filesystem::path config = directory / "config.json";
  ModelWeights weights(from_hf_config(read_json(config), config.string()), DType::f32);
  load_weights(directory, weights);
  return weights;
}

void write_model(CheckpointWriter& writer, const ModelWeights& weights, DType dtype,
                 const std::filesystem::path& tokenizer) {
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, const Parameter*> by_name;
  for (const Parameter& parameter : weights.table().parameters) {
    items.push_back({parameter.name, dtype, parameter.shape.sizes()});
    by_name[parameter.name] = &parameter;
  }
  SafetensorsWriter out(writer.directory() / "model.safetensors", items);
  for (const SafetensorsWriter::Item& item : out.layout())
    append_weights(out, weights.view(*by_name.at(item.name)), dtype);
  out.finish();

  const LlamaConfig& config = weights.config();
  writer.write_json("config.json", to_hf_config(config, dtype == DType::f32 ? "float32" : "bfloat16"));
  writer.write_json("generation_config.json", {{"bos_token_id", config.bos}, {"eos_token_id", config.eos}});
  if (tokenizer.empty()) return;
  writer.copy_file(tokenizer, "tokenizer.model");
  writer.write_json("tokenizer_config.json", {{"tokenizer_class", "LlamaTokenizer"},
                                              {"bos_token", "<s>"},
                                              {"eos_token", "</s>"},
                                              {"unk_token", "<unk>"},
                                              {"add_bos_token", false},  // nor do token shards hold one
                                              {"add_eos_token", false},
                                              {"legacy", false},
                                              {"clean_up_tokenization_spaces", false}});
}

}  // namespace kiln

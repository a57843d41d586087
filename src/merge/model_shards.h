#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "io/safetensors.h"

namespace kiln {

/// One file of a model, and its tensors in the order of their bytes.
struct ModelShard {
  std::string file;  // "model.safetensors", or "model-00001-of-00003.safetensors"
  std::vector<SafetensorsWriter::Item> items;
};

/// Tensors in consecutive files of at most `max_bytes` of data each; a larger tensor has one of its own. One file
/// follows the other in the order that a single file would have, so that inputs are read front to back either way.
///
/// in     max_bytes 0: a single file
/// out    one shard at least; a single one is named model.safetensors and needs no index
std::vector<ModelShard> model_shards(std::vector<SafetensorsWriter::Item> items, std::uint64_t max_bytes);

/// model.safetensors.index.json of shards, as transformers writes it: the file of every tensor, and totals.
Json shard_index(const std::vector<ModelShard>& shards);

}  // namespace kiln

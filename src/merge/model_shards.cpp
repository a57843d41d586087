#include "merge/model_shards.h"

#include <fmt/format.h>

#include <numeric>

namespace kiln {
namespace {

std::uint64_t elements_of(const SafetensorsWriter::Item& item) {
  return std::accumulate(
      item.shape.begin(), item.shape.end(), std::uint64_t{1},
      [](std::uint64_t count, std::int64_t size) { return count * static_cast<std::uint64_t>(size); });
}

std::uint64_t bytes_of(const SafetensorsWriter::Item& item) { return elements_of(item) * size_of(item.dtype); }

}  // namespace

std::vector<ModelShard> model_shards(std::vector<SafetensorsWriter::Item> items, std::uint64_t max_bytes) {
  std::vector<ModelShard> shards(1);
  std::uint64_t bytes = 0;  // of the last shard
  for (SafetensorsWriter::Item& item : in_layout_order(std::move(items))) {
    if (max_bytes > 0 && !shards.back().items.empty() && bytes + bytes_of(item) > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    bytes += bytes_of(item);
    shards.back().items.push_back(std::move(item));
  }
  for (std::size_t i = 0; i < shards.size(); ++i)
    shards[i].file = shards.size() == 1 ? "model.safetensors"
                                        : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
  return shards;
}

Json shard_index(const std::vector<ModelShard>& shards) {
  Json map = Json::object();
  std::uint64_t bytes = 0, elements = 0;
  for (const ModelShard& shard : shards)
    for (const SafetensorsWriter::Item& item : shard.items) {
      map[item.name] = shard.file;
      bytes += bytes_of(item);
      elements += elements_of(item);
    }
  return {{"metadata", {{"total_parameters", elements}, {"total_size", bytes}}}, {"weight_map", map}};
}

}  // namespace kiln

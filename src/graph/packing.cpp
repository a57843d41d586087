#include "graph/packing.h"

#include <algorithm>
#include <cstdint>

namespace kiln {
namespace {

constexpr std::size_t kAlignment = 256;

struct Block {
  std::size_t bytes;
  int first, last;  // nodes between which the bytes are in use, both included
  std::size_t* offset;
  Role role;
};

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Groups as the backend forms them, and the moment of each node: the first node of its group.
std::vector<int> group_nodes(const Plan& plan, const Backend& backend, Packing& packing) {
  std::vector<int> moment(plan.nodes().size());
  for (std::size_t n = 0; n < plan.nodes().size(); n += packing.groups.back().count) {
    const NodeGroup group = backend.group(plan, n);
    packing.groups.push_back(group);
    packing.workspace_bytes[n] = backend.workspace_bytes(plan, group);
    for (std::size_t i = n; i < n + group.count; ++i) {
      check(plan.nodes()[i].phase == plan.nodes()[n].phase, "a group of nodes spans two phases");
      moment[i] = static_cast<int>(n);
    }
  }
  return moment;
}

/// First and last use of every value, widened over the repeated micro phase where the value must survive it.
std::vector<Block> lifetimes(const Plan& plan, int micro_batches, const std::vector<int>& moment, Packing& packing) {
  const int node_count = static_cast<int>(plan.nodes().size());
  struct Life {
    int first = INT32_MAX, last = -1;
    bool read_in_update = false;
  };
  std::vector<Life> lives(plan.values().size());
  int micro_end = 0;
  for (std::size_t n = 0; n < moment.size(); ++n) {
    const Node& node = plan.nodes()[n];
    const int at = moment[n];
    if (node.phase == Phase::micro) micro_end = at;
    auto use = [&](ValueId id) {
      Life& life = lives[static_cast<std::size_t>(id.index)];
      life.first = std::min(life.first, at);
      life.last = std::max(life.last, at);
      life.read_in_update = life.read_in_update || node.phase == Phase::update;
    };
    for (const ValueId id : node.in) use(id);
    for (const ValueId id : node.out) use(id);
  }
  std::vector<Block> blocks;
  for (std::size_t v = 0; v < lives.size(); ++v) {
    const Value& value = plan.values()[v];
    Life& life = lives[v];
    if (value.external || life.last < 0) continue;
    const bool survives = value.kept || plan.is_parameter_gradient({static_cast<int>(v)}) || life.read_in_update;
    if (micro_batches > 1 && survives && life.first <= micro_end) {
      life.first = 0;
      life.last = std::max(life.last, micro_end);
    }
    if (value.kept) life.last = node_count;
    blocks.push_back({aligned(value.spec.bytes()), life.first, life.last, &packing.value_offset[v], value.role});
  }
  for (const NodeGroup group : packing.groups) {
    const std::size_t bytes = aligned(packing.workspace_bytes[group.first]);
    const int at = static_cast<int>(group.first);
    if (bytes > 0) blocks.push_back({bytes, at, at, &packing.workspace_offset[group.first], Role::workspace});
  }
  return blocks;
}

}  // namespace

Packing pack(const Plan& plan, int micro_batches, const Backend& backend) {
  Packing packing;
  packing.value_offset.resize(plan.values().size());
  packing.workspace_offset.resize(plan.nodes().size());
  packing.workspace_bytes.resize(plan.nodes().size());
  const std::vector<int> moment = group_nodes(plan, backend, packing);
  std::vector<Block> blocks = lifetimes(plan, micro_batches, moment, packing);

  std::vector<std::size_t> live(plan.nodes().size() + 1, 0);
  for (const Block& block : blocks) {
    packing.unpacked_bytes += block.bytes;
    for (int n = block.first; n <= block.last; ++n) live[static_cast<std::size_t>(n)] += block.bytes;
  }
  const auto fullest = std::max_element(live.begin(), live.end());
  packing.live_bytes = *fullest;
  const auto peak = static_cast<int>(fullest - live.begin());
  for (const Block& block : blocks)
    if (block.first <= peak && peak <= block.last)
      packing.live_by_role[static_cast<std::size_t>(block.role)] += block.bytes;

  std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.bytes > b.bytes; });
  std::vector<const Block*> placed;  // ascending by offset
  for (const Block& block : blocks) {
    // The lowest gap between rivals (blocks alive at the same time) that is wide enough.
    std::size_t offset = 0;
    for (const Block* other : placed) {
      if (other->last < block.first || block.last < other->first) continue;
      if (*other->offset >= offset + block.bytes) break;
      offset = std::max(offset, *other->offset + other->bytes);
    }
    *block.offset = offset;
    packing.arena_bytes = std::max(packing.arena_bytes, offset + block.bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &block,
                                   [](const Block* a, const Block* b) { return *a->offset < *b->offset; }),
                  &block);
  }
  return packing;
}

}  // namespace kiln

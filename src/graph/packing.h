#pragma once
#include <array>
#include <vector>

#include "graph/backend.h"

namespace kiln {

/// Where every arena value of a plan lives. Offsets are multiples of 256 bytes.
struct Packing {
  std::vector<std::size_t> value_offset;               // by value index; meaningless for external values
  std::vector<NodeGroup> groups;                       // every node once, in order
  std::vector<std::size_t> workspace_offset;           // by index of a group's first node
  std::vector<std::size_t> workspace_bytes;            // likewise
  std::size_t arena_bytes = 0;                         // exact peak, known before anything runs
  std::size_t live_bytes = 0;                          // most bytes alive at one node: the lower bound of arena_bytes
  std::size_t unpacked_bytes = 0;                      // what it would take without reuse
  std::array<std::size_t, kRoleCount> live_by_role{};  // live_bytes, by Role
};

/// Assigns offsets so that values alive at the same time never overlap, largest first.
/// With `micro_batches` > 1 the micro phase repeats, so what it leaves for the update phase (parameter gradients) and
/// kept values hold their bytes through all of it; with 1 a gradient's bytes are free outside [written, last read].
/// Nodes that the backend runs as one group count as one moment.
Packing pack(const Plan& plan, int micro_batches, const Backend& backend = cpu_backend());

}  // namespace kiln

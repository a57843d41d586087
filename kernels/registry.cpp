#include <vector>

#include "kernels/context.h"

namespace kiln::cuda {
namespace {

/// Every op of the GPU; pairs first, since they win over their first node alone.
const std::vector<OpEntry>& entries() {
  static const std::vector<OpEntry> list{linear_rope_entry(),
                                         linear_swiglu_entry(),
                                         linear_add_norm_entry(),
                                         linear_swiglu_gradient_entry(),
                                         attention_rope_gradient_entry(),
                                         embedding_entry(),
                                         embedding_gradient_entry(),
                                         linear_entry(),
                                         linear_input_gradient_entry(),
                                         linear_weight_gradient_entry(),
                                         rms_norm_entry(),
                                         add_rms_norm_entry(),
                                         rms_norm_gradient_entry(),
                                         rms_scale_entry(),
                                         rope_entry(),
                                         rope_gradient_entry(),
                                         attention_entry(),
                                         attention_gradient_entry(),
                                         cached_attention_entry(),
                                         swiglu_entry(),
                                         swiglu_gradient_entry(),
                                         classifier_entry(),
                                         classifier_with_gradient_entry(),
                                         last_row_entry(),
                                         loss_sum_entry(),
                                         gradient_norm_entry(),
                                         adam_entry(),
                                         adam8bit_entry(),
                                         galore_entry(),
                                         fira_entry(),
                                         fira_plus_entry(),
                                         apollo_entry(),
                                         muon_entry(),
                                         lora_entry()};
  return list;
}

}  // namespace

const OpEntry* find_entry(const Plan& plan, std::size_t node, NodeGroup& group) {
  const std::vector<Node>& nodes = plan.nodes();
  auto follows = [&](std::size_t i, std::string_view name) {
    return i < nodes.size() && nodes[i].phase == nodes[node].phase && nodes[i].op->name() == name;
  };
  for (const OpEntry& entry : entries()) {
    if (nodes[node].op->name() != entry.name) continue;
    group = {node, 1};
    if (!entry.second.empty()) {
      group.count = 2;
      if (!follows(node + 1, entry.second) || !entry.fuses({plan, group})) continue;
    } else if (entry.any_count) {
      while (follows(node + group.count, entry.name)) ++group.count;
    }
    return &entry;
  }
  group = {node, 1};
  return nullptr;
}

}  // namespace kiln::cuda

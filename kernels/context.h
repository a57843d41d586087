#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "graph/backend.h"
#include "kernels/gemm_plans.h"
#include "kernels/row_order.h"
#include "kernels/symmetric_eigen.h"

namespace kiln::cuda {

/// What kernels share: the device's stream, its GEMM plans, and memory for their tables.
struct Context {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  GemmPlans* gemms = nullptr;
  std::function<Buffer(std::size_t bytes, std::string_view what)> allocate;  // Backend::allocate
  std::function<SymmetricEigen&()> eigen;                                    // made at the first call
  /// Of the last kernel made that has an order; others, such as embedding, RoPE by itself, the gradient norm and
  /// updates, leave it. A plan's kernels are made in the order in which they run. It changes the speed alone, never a
  /// result.
  RowOrder last_order = RowOrder::ascending;

  /// The order for a kernel that can choose: it begins with the rows where the one before ended.
  RowOrder turn() { return last_order = opposite(last_order); }
  /// For a kernel that cannot, as those of cuBLASLt.
  void ascend() { last_order = RowOrder::ascending; }
};

/// Fills memory of the device from the host; waits, so that `from` may go.
void copy_to_device(const Buffer& to, const void* from, cudaStream_t stream);

/// A kernel that is one function of its node's tensors.
class SimpleKernel final : public Kernel {
 public:
  explicit SimpleKernel(std::function<void(const KernelArgs&)> function) : function_(std::move(function)) {}
  void run(std::span<const KernelArgs> nodes) override { function_(nodes.front()); }

 private:
  std::function<void(const KernelArgs&)> function_;
};

template <typename F>
std::unique_ptr<Kernel> simple_kernel(F&& function) {
  return std::make_unique<SimpleKernel>(std::forward<F>(function));
}

/// Nodes of one group as its factory sees them.
struct Nodes {
  const Plan& plan;
  NodeGroup group;
  const Node& node(std::size_t i = 0) const { return plan.nodes()[group.first + i]; }
  std::vector<TensorSpec> inputs(std::size_t i = 0) const { return plan.input_specs(node(i)); }
  template <typename T>
  const T& op(std::size_t i = 0) const {
    return dynamic_cast<const T&>(*node(i).op);
  }
};

/// How one op, or a pair of neighbours fused, runs on the GPU.
struct OpEntry {
  std::string_view name;                                   // Op::name() of the first node
  std::string_view second = {};                            // and of the second, for a pair
  std::size_t (*workspace_bytes)(const Nodes&) = nullptr;  // null: none
  std::unique_ptr<Kernel> (*make)(const Nodes&, Context&) = nullptr;
  /// Throws the usage Error of nodes that make() does not take; without a device, so that a plan can tell. Null: make()
  /// tells itself.
  void (*check)(const Nodes&) = nullptr;
  /// For a pair: whether the fused kernel takes these shapes and no other node needs what it leaves out.
  bool (*fuses)(const Nodes&) = nullptr;
  bool any_count = false;  // takes all neighbours of that name in one launch
  /// Whether run() waits for the device: its plan can then not be captured. Null: never.
  bool (*blocks_host)(const Nodes&) = nullptr;
};

/// Throws the shapes' usage Error unless `condition`: the door for what a kernel cannot do.
template <typename... Arguments>
void require(bool condition, fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  if (!condition) throw Error(ExitCode::usage, "cuda: " + fmt::format(format, std::forward<Arguments>(arguments)...));
}

// One per file of kernels/; registry.cpp lists them.
OpEntry embedding_entry();
OpEntry embedding_gradient_entry();
OpEntry linear_entry();
OpEntry linear_input_gradient_entry();
OpEntry linear_weight_gradient_entry();
OpEntry rms_norm_entry();
OpEntry add_rms_norm_entry();
OpEntry rms_norm_gradient_entry();
OpEntry rms_scale_entry();
OpEntry rope_entry();
OpEntry rope_gradient_entry();
OpEntry attention_entry();
OpEntry attention_gradient_entry();
OpEntry attention_rope_gradient_entry();
OpEntry cached_attention_entry();
OpEntry swiglu_entry();
OpEntry swiglu_gradient_entry();
OpEntry linear_rope_entry();
OpEntry linear_swiglu_entry();
OpEntry linear_add_norm_entry();
OpEntry linear_swiglu_gradient_entry();
OpEntry classifier_entry();
OpEntry classifier_with_gradient_entry();
OpEntry last_row_entry();
OpEntry loss_sum_entry();
OpEntry gradient_norm_entry();
OpEntry adam_entry();
OpEntry adam8bit_entry();
OpEntry galore_entry();
OpEntry fira_entry();
OpEntry fira_plus_entry();
OpEntry apollo_entry();
OpEntry muon_entry();
OpEntry lora_entry();

/// The entry for a node, pairs first; null when the GPU has none.
const OpEntry* find_entry(const Plan& plan, std::size_t node, NodeGroup& group);

}  // namespace kiln::cuda

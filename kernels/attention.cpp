#include "kernels/attention.h"

#include "kernels/context.h"
#include "ops/attention.h"
#include "ops/rope.h"

namespace kiln::cuda {
namespace {

using bf16 = __nv_bfloat16;

template <typename T>
void check_supported(const Nodes& nodes) {
  const AttentionShape shape = nodes.op<T>().shape();
  require(
      nodes.inputs()[0].dtype == DType::bf16 && attention_supported(shape),
      "attention: {} with {} heads of {} over {} key heads, expected bf16, heads of 32, 64 or 128, and query heads in "
      "multiples of key heads",
      to_string(nodes.inputs()[0].dtype), shape.heads, shape.head_dim, shape.kv_heads);
}

std::unique_ptr<Kernel> make_forward(const Nodes& nodes, Context& context) {
  const AttentionShape shape = nodes.op<Attention>().shape();
  return simple_kernel([shape, order = context.turn(), stream = context.stream](const KernelArgs& args) {
    attention_forward(shape, args.in[0].shape()[0],
                      {.qkv = static_cast<const bf16*>(args.in[0].data),
                       .o = static_cast<bf16*>(args.out[0].data),
                       .lse = args.out[1].as<float>(),
                       .order = order},
                      stream);
  });
}

std::size_t gradient_workspace(const Nodes& nodes) {
  return attention_backward_workspace_bytes(nodes.op<AttentionGradient>().shape(), nodes.inputs()[0].shape[0]);
}

/// The gradient alone, or with the inverse rotation of the node after it.
class GradientKernel final : public Kernel {
 public:
  GradientKernel(const AttentionShape& shape, Context& context)
      : shape_(shape), order_(context.turn()), stream_(context.stream) {
    if (!attention_gradient_fuses(shape)) context.turn();  // two kernels, there and back
  }
  void run(std::span<const KernelArgs> nodes) override {
    const KernelArgs& args = nodes.front();
    attention_backward(shape_, args.in[0].shape()[0],
                       {.qkv = static_cast<const bf16*>(args.in[0].data),
                        .o = static_cast<const bf16*>(args.in[1].data),
                        .lse = args.in[2].as<float>(),
                        .dout = static_cast<const bf16*>(args.in[3].data),
                        .rope = nodes.size() > 1 ? nodes[1].in[1].as<float>() : nullptr,
                        .dqkv = static_cast<bf16*>(args.out[0].data),
                        .workspace = args.workspace.data,
                        .order = order_},
                       stream_);
  }

 private:
  AttentionShape shape_;
  RowOrder order_;
  cudaStream_t stream_;
};

std::unique_ptr<Kernel> make_gradient(const Nodes& nodes, Context& context) {
  const AttentionShape shape = nodes.op<AttentionGradient>().shape();
  return std::make_unique<GradientKernel>(shape, context);
}

/// rope_dx rotates what attention_dx wrote; positions of training begin at 0 (Rope's `first` is not read).
bool rotates_gradient(const Nodes& nodes) {
  return nodes.node(1).in[0] == nodes.node(0).out[0] && attention_supported(nodes.op<AttentionGradient>().shape());
}

}  // namespace

OpEntry attention_entry() { return {.name = "attention", .make = make_forward, .check = check_supported<Attention>}; }
OpEntry attention_gradient_entry() {
  return {.name = "attention_dx",
          .workspace_bytes = gradient_workspace,
          .make = make_gradient,
          .check = check_supported<AttentionGradient>};
}
OpEntry attention_rope_gradient_entry() {
  return {.name = "attention_dx",
          .second = "rope_dx",
          .workspace_bytes = gradient_workspace,
          .make = make_gradient,
          .check = check_supported<AttentionGradient>,
          .fuses = rotates_gradient};
}

}  // namespace kiln::cuda

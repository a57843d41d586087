#include "kernels/context.h"
#include "kernels/gemm_hopper.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

// A projection and what follows it. RoPE, SwiGLU and its gradient are epilogues of our own GEMMs (gemm_hopper.h): one
// kernel. The residual sum is C of cuBLASLt's product with beta 1, and the norm the kernel after it: two, and one pass
// over the activations less. Tests hold each against its two nodes run apart.
namespace kiln::cuda {
namespace {

using bf16 = __nv_bfloat16;

int narrow(std::int64_t size) { return static_cast<int>(size); }

/// The last use of the first node's output is the second node.
bool only_second_reads(const Nodes& nodes) {
  const ValueId value = nodes.node(0).out[0];
  if (nodes.plan.value(value).kept) return false;
  std::size_t uses = 0;
  for (const Node& node : nodes.plan.nodes())
    for (const ValueId in : node.in) uses += in == value ? 1 : 0;
  return uses == 1;
}

bool fuses_rope(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs(0);
  const AttentionShape& shape = nodes.op<Rope>(1).shape();
  return nodes.node(1).in[0] == nodes.node(0).out[0] &&
         nodes.plan.value(nodes.node(1).in[1]).spec.shape[0] == shape.seq_len &&
         gemm_rope_supported(narrow(in[0].shape[0]), narrow(in[1].shape[0]), narrow(in[0].shape[1]),
                             narrow(shape.head_dim));
}

class RopeKernel final : public Kernel {
 public:
  RopeKernel(const AttentionShape& shape, Context& context)
      : shape_(shape), order_(context.turn()), stream_(context.stream) {}
  void run(std::span<const KernelArgs> nodes) override {
    const KernelArgs& linear = nodes[0];
    gemm_rope({.x = static_cast<const bf16*>(linear.in[0].data),
               .w = static_cast<const bf16*>(linear.in[1].data),
               .table = nodes[1].in[1].as<float>(),
               .qkv = static_cast<bf16*>(linear.out[0].data),
               .m = narrow(linear.in[0].shape()[0]),
               .n = narrow(linear.in[1].shape()[0]),
               .c = narrow(linear.in[0].shape()[1]),
               .head_size = narrow(shape_.head_dim),
               .rotated_heads = narrow(shape_.heads + shape_.kv_heads),
               .tokens = narrow(shape_.seq_len),
               .order = order_},
              stream_);
  }

 private:
  AttentionShape shape_;
  RowOrder order_;
  cudaStream_t stream_;
};

std::unique_ptr<Kernel> make_rope(const Nodes& nodes, Context& context) {
  return std::make_unique<RopeKernel>(nodes.op<Rope>(1).shape(), context);
}

bool fuses_swiglu(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs(0);
  return nodes.node(1).in[0] == nodes.node(0).out[0] &&
         gemm_swiglu_supported(narrow(in[0].shape[0]), narrow(in[0].shape[1]), narrow(in[1].shape[0] / 2));
}

class SwigluKernel final : public Kernel {
 public:
  explicit SwigluKernel(Context& context) : order_(context.turn()), stream_(context.stream) {}
  void run(std::span<const KernelArgs> nodes) override {
    const KernelArgs& linear = nodes[0];
    gemm_swiglu({.x = static_cast<const bf16*>(linear.in[0].data),
                 .w = static_cast<const bf16*>(linear.in[1].data),
                 .gate_up = static_cast<bf16*>(linear.out[0].data),
                 .a = static_cast<bf16*>(nodes[1].out[0].data),
                 .m = narrow(linear.in[0].shape()[0]),
                 .c = narrow(linear.in[0].shape()[1]),
                 .f = narrow(linear.in[1].shape()[0] / 2),
                 .order = order_},
                stream_);
  }

 private:
  RowOrder order_;
  cudaStream_t stream_;
};

std::unique_ptr<Kernel> make_swiglu(const Nodes&, Context& context) { return std::make_unique<SwigluKernel>(context); }

/// linear_dx of the down projection, whose result nothing but swiglu_dx reads: it is never stored.
bool fuses_swiglu_gradient(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs(0);
  return nodes.node(1).in[1] == nodes.node(0).out[0] && only_second_reads(nodes) &&
         gemm_swiglu_backward_supported(narrow(in[0].shape[0]), narrow(in[0].shape[1]), narrow(in[1].shape[1]));
}

class SwigluGradientKernel final : public Kernel {
 public:
  explicit SwigluGradientKernel(Context& context) : order_(context.turn()), stream_(context.stream) {}
  void run(std::span<const KernelArgs> nodes) override {
    const KernelArgs& linear = nodes[0];
    gemm_swiglu_backward({.dy = static_cast<const bf16*>(linear.in[0].data),
                          .w = static_cast<const bf16*>(linear.in[1].data),
                          .gate_up = static_cast<const bf16*>(nodes[1].in[0].data),
                          .dgate_up = static_cast<bf16*>(nodes[1].out[0].data),
                          .m = narrow(linear.in[0].shape()[0]),
                          .c = narrow(linear.in[0].shape()[1]),
                          .f = narrow(linear.in[1].shape()[1]),
                          .order = order_},
                         stream_);
  }

 private:
  RowOrder order_;
  cudaStream_t stream_;
};

std::unique_ptr<Kernel> make_swiglu_gradient(const Nodes&, Context& context) {
  return std::make_unique<SwigluGradientKernel>(context);
}

/// A projection that the residual stream takes in: the GEMM adds to it and rounds once, and the norm reads the sum.
bool fuses_add_norm(const Nodes& nodes) {
  return nodes.node(1).in[2] == nodes.node(0).out[0] && nodes.node(1).in[0] != nodes.node(0).out[0] &&
         only_second_reads(nodes);
}

class AddNormKernel final : public Kernel {
 public:
  AddNormKernel(const RmsNorm::Options& options, Context& context) : options_(options), context_(context) {
    context.ascend();
    order_ = context.turn();
  }
  void run(std::span<const KernelArgs> nodes) override {
    const Tensor& sum = nodes[1].out[2];
    Gemm gemm = projection(nodes[0].in[0], nodes[0].in[1], sum);
    gemm.add = nodes[1].in[0].data;  // the residual
    context_.gemms->run(gemm, nodes[0].workspace.data);
    norm_forward({.x = static_cast<const bf16*>(sum.data),
                  .w = static_cast<const bf16*>(nodes[1].in[1].data),
                  .y = static_cast<bf16*>(nodes[1].out[0].data),
                  .rstd = nodes[1].out[1].as<float>(),
                  .rows = sum.shape()[0],
                  .width = narrow(sum.shape()[1]),
                  .eps = static_cast<float>(options_.eps),
                  .order = order_},
                 context_.stream);
  }

 private:
  RmsNorm::Options options_;
  Context& context_;
  RowOrder order_;
};

std::unique_ptr<Kernel> make_add_norm(const Nodes& nodes, Context& context) {
  return std::make_unique<AddNormKernel>(nodes.op<RmsNorm>(1).options(), context);
}

std::size_t add_norm_workspace(const Nodes&) { return GemmPlans::kWorkspaceBytes; }

void check_add_norm(const Nodes& nodes) {
  check_operands(nodes);
  check_norm_width(nodes.inputs(1)[0]);
}

}  // namespace

OpEntry linear_rope_entry() {
  return {.name = "linear", .second = "rope", .make = make_rope, .check = check_operands, .fuses = fuses_rope};
}
OpEntry linear_swiglu_entry() {
  return {.name = "linear", .second = "swiglu", .make = make_swiglu, .check = check_operands, .fuses = fuses_swiglu};
}
OpEntry linear_add_norm_entry() {
  return {.name = "linear",
          .second = "add_rms_norm",
          .workspace_bytes = add_norm_workspace,
          .make = make_add_norm,
          .check = check_add_norm,
          .fuses = fuses_add_norm};
}
OpEntry linear_swiglu_gradient_entry() {
  return {.name = "linear_dx",
          .second = "swiglu_dx",
          .make = make_swiglu_gradient,
          .check = check_operands,
          .fuses = fuses_swiglu_gradient};
}

}  // namespace kiln::cuda

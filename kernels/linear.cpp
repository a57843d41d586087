#include "ops/linear.h"

#include "kernels/context.h"

namespace kiln::cuda {
namespace {

std::size_t gemm_workspace(const Nodes&) { return GemmPlans::kWorkspaceBytes; }

void require_bf16(const Nodes& nodes) {
  require(nodes.inputs()[0].dtype == DType::bf16, "{}: dtype {}, expected bf16", nodes.node().op->name(),
          to_string(nodes.inputs()[0].dtype));
}

std::unique_ptr<Kernel> make_linear(const Nodes& nodes, Context& context) {
  require_bf16(nodes);
  context.ascend();
  return simple_kernel([&context](const KernelArgs& args) {
    const Tensor &x = args.in[0], &w = args.in[1];
    const std::int64_t k = x.shape()[1], m = w.shape()[0];
    context.gemms->run({.trans_b = Trans::yes,
                        .m = x.shape()[0],
                        .n = m,
                        .k = k,
                        .a = x.data,
                        .lda = k,
                        .b = w.data,
                        .ldb = k,
                        .c = args.out[0].data,
                        .ldc = m},
                       args.workspace.data);
  });
}

std::unique_ptr<Kernel> make_input_gradient(const Nodes& nodes, Context& context) {
  require_bf16(nodes);
  context.ascend();
  return simple_kernel([&context](const KernelArgs& args) {
    const Tensor &dy = args.in[0], &w = args.in[1];
    const std::int64_t m = dy.shape()[1], k = w.shape()[1];
    context.gemms->run({.m = dy.shape()[0],
                        .n = k,
                        .k = m,
                        .a = dy.data,
                        .lda = m,
                        .b = w.data,
                        .ldb = k,
                        .c = args.out[0].data,
                        .ldc = k},
                       args.workspace.data);
  });
}

std::unique_ptr<Kernel> make_weight_gradient(const Nodes& nodes, Context& context) {
  require_bf16(nodes);
  context.ascend();
  const bool add = nodes.node().out.empty();
  return simple_kernel([&context, add](const KernelArgs& args) {
    const Tensor &dy = args.in[0], &x = args.in[1];
    const std::int64_t m = dy.shape()[1], k = x.shape()[1];
    const Tensor& dw = add ? args.in[2] : args.out[0];
    context.gemms->run({.trans_a = Trans::yes,
                        .m = m,
                        .n = k,
                        .k = dy.shape()[0],
                        .a = dy.data,
                        .lda = m,
                        .b = x.data,
                        .ldb = k,
                        .c = dw.data,
                        .ldc = k,
                        .c_type = dw.dtype(),
                        .accumulate = add || args.accumulate},
                       args.workspace.data);
  });
}

}  // namespace

OpEntry linear_entry() { return {.name = "linear", .workspace_bytes = gemm_workspace, .make = make_linear}; }
OpEntry linear_input_gradient_entry() {
  return {.name = "linear_dx", .workspace_bytes = gemm_workspace, .make = make_input_gradient};
}
OpEntry linear_weight_gradient_entry() {
  return {.name = "linear_dw", .workspace_bytes = gemm_workspace, .make = make_weight_gradient};
}

}  // namespace kiln::cuda

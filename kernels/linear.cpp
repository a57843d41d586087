#include "kernels/linear.h"

#include "ops/linear.h"

namespace kiln::cuda {
namespace {

std::size_t gemm_workspace(const Nodes&) { return GemmPlans::kWorkspaceBytes; }

std::unique_ptr<Kernel> make_linear(const Nodes&, Context& context) {
  context.ascend();
  return simple_kernel([&context](const KernelArgs& args) {
    context.gemms->run(projection(args.in[0], args.in[1], args.out[0]), args.workspace.data);
  });
}

std::unique_ptr<Kernel> make_input_gradient(const Nodes&, Context& context) {
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

Gemm projection(const Tensor& x, const Tensor& w, const Tensor& y) {
  const std::int64_t k = x.shape()[1], m = w.shape()[0];
  return {.trans_b = Trans::yes,
          .m = x.shape()[0],
          .n = m,
          .k = k,
          .a = x.data,
          .lda = k,
          .b = w.data,
          .ldb = k,
          .c = y.data,
          .ldc = m};
}

void check_operands(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs();
  for (std::size_t i = 0; i < 2; ++i)
    require(in[i].dtype == DType::bf16, "{}: operand {} {}, expected bf16", nodes.node().op->name(),
            to_string(in[i].dtype), in[i].shape.str());
}

OpEntry linear_entry() {
  return {.name = "linear", .workspace_bytes = gemm_workspace, .make = make_linear, .check = check_operands};
}
OpEntry linear_input_gradient_entry() {
  return {.name = "linear_dx", .workspace_bytes = gemm_workspace, .make = make_input_gradient, .check = check_operands};
}
OpEntry linear_weight_gradient_entry() {
  return {
      .name = "linear_dw", .workspace_bytes = gemm_workspace, .make = make_weight_gradient, .check = check_operands};
}

}  // namespace kiln::cuda

#include "ops/linear.h"

#include "ops/checks.h"
#include "ops/gemm.h"

namespace kiln {
namespace {

/// N x M x K multiply-adds, each matrix touched once.
Cost gemm_cost(DType dtype, std::int64_t n, std::int64_t m, std::int64_t k) {
  const auto size = static_cast<double>(size_of(dtype));
  const double c = static_cast<double>(n) * static_cast<double>(m + k) + static_cast<double>(m * k);
  return {2.0 * static_cast<double>(n) * static_cast<double>(m) * static_cast<double>(k), size * c};
}

}  // namespace

std::vector<TensorSpec> Linear::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 2);
  expect_same_real(name(), in);
  expect_rank(name(), "x", in[0], 2);
  expect_rank(name(), "w", in[1], 2);
  check(in[0].shape[1] == in[1].shape[1], "linear: inner sizes {} and {} (x {} · w {}')", in[0].shape[1],
        in[1].shape[1], in[0].shape.str(), in[1].shape.str());
  return {{{in[0].shape[0], in[1].shape[0]}, in[0].dtype}};
}

void Linear::gradient(GradientContext& context) const {
  const ValueId dy = context.grad_out(0);
  if (context.needs_gradient(1)) {
    if (context.grad_in(1).valid())
      context.add(std::make_shared<LinearWeightGradient>(true, gradients_), {dy, context.in(0), context.grad_in(1)},
                  "dw");
    else
      context.set_grad_in(
          1, context.add(std::make_shared<LinearWeightGradient>(false, gradients_), {dy, context.in(0)}, "dw")[0]);
  }
  if (context.needs_gradient(0))
    context.set_grad_in(0, context.add(std::make_shared<LinearInputGradient>(), {dy, context.in(1)}, "dx")[0]);
}

Cost Linear::cost(std::span<const TensorSpec> in) const {
  return gemm_cost(in[0].dtype, in[0].shape[0], in[1].shape[0], in[0].shape[1]);
}

void Linear::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], k = args.in[0].shape()[1], m = args.in[1].shape()[0];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    gemm<T>({.trans_a = Trans::no,
             .trans_b = Trans::yes,
             .m = n,
             .n = m,
             .k = k,
             .a = args.in[0].as<T>(),
             .lda = k,
             .b = args.in[1].as<T>(),
             .ldb = k,
             .c = args.out[0].as<T>(),
             .ldc = m});
  });
}

std::vector<TensorSpec> LinearInputGradient::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 2);
  expect_same_real(name(), in);
  expect_shape(name(), "dy", in[0], {in[0].shape[0], in[1].shape[0]});
  return {{{in[0].shape[0], in[1].shape[1]}, in[0].dtype}};
}

Cost LinearInputGradient::cost(std::span<const TensorSpec> in) const {
  return gemm_cost(in[0].dtype, in[0].shape[0], in[1].shape[0], in[1].shape[1]);
}

void LinearInputGradient::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], m = args.in[0].shape()[1], k = args.in[1].shape()[1];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    gemm<T>({.trans_a = Trans::no,
             .trans_b = Trans::no,
             .m = n,
             .n = k,
             .k = m,
             .a = args.in[0].as<T>(),
             .lda = m,
             .b = args.in[1].as<T>(),
             .ldb = k,
             .c = args.out[0].as<T>(),
             .ldc = k});
  });
}

std::vector<TensorSpec> LinearWeightGradient::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, add_ ? 3 : 2);
  expect_same_real(name(), in.first(2));
  const Shape shape{in[0].shape[1], in[1].shape[1]};
  expect_shape(name(), "dy", in[0], {in[1].shape[0], in[0].shape[1]});
  if (!add_) return {{shape, dtype(in[0])}};
  expect_shape(name(), "dw", in[2], shape);
  expect_dtype(name(), "dw", in[2], dtype(in[0]));
  return {};
}

Cost LinearWeightGradient::cost(std::span<const TensorSpec> in) const {
  return gemm_cost(in[0].dtype, in[0].shape[0], in[0].shape[1], in[1].shape[1]);
}

void LinearWeightGradient::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], m = args.in[0].shape()[1], k = args.in[1].shape()[1];
  const Tensor dw = add_ ? args.in[2] : args.out[0];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    gemm<T>({.trans_a = Trans::yes,
             .trans_b = Trans::no,
             .m = m,
             .n = k,
             .k = n,
             .a = args.in[0].as<T>(),
             .lda = m,
             .b = args.in[1].as<T>(),
             .ldb = k,
             .c = dw.as<T>(),
             .ldc = k,
             .beta = add_ || args.accumulate ? T(1) : T(0)});
  });
}

}  // namespace kiln

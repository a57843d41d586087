#include "ops/swiglu.h"

#include "core/parallel.h"
#include "ops/checks.h"
#include "ops/simd.h"

namespace kiln {
namespace {

/// Applies `body(offset, lanes)` to [0, n) in whole vectors and one partial one.
template <typename T, typename Body>
void for_vectors(std::int64_t n, Body&& body) {
  std::int64_t i = 0;
  for (; i + simd::kLanes<T> <= n; i += simd::kLanes<T>) body(i, std::int64_t{simd::kLanes<T>});
  if (i < n) body(i, n - i);
}

template <typename T>
simd::Vector<T> load_lanes(const T* p, std::int64_t lanes) {
  return lanes == simd::kLanes<T> ? simd::load(p) : simd::load_partial(p, lanes, T(0));
}

template <typename T>
void store_lanes(T* p, std::int64_t lanes, simd::Vector<T> v) {
  if (lanes == simd::kLanes<T>)
    simd::store<T>(p, v);
  else
    simd::store_partial<T>(p, lanes, v);
}

template <typename T>
simd::Vector<T> sigmoid(simd::Vector<T> x) {
  return T(1) / (T(1) + simd::exp<T>(-x));
}

}  // namespace

std::vector<TensorSpec> SwiGlu::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 1);
  expect_same_real(name(), in);
  expect_rank(name(), "x", in[0], 2);
  check(in[0].shape[1] % 2 == 0, "swiglu: x has {} columns, expected gate and up of one width", in[0].shape[1]);
  return {{{in[0].shape[0], in[0].shape[1] / 2}, in[0].dtype}};
}

void SwiGlu::gradient(GradientContext& context) const {
  if (!context.needs_gradient(0)) return;
  context.set_grad_in(
      0, context.add(std::make_shared<SwiGluGradient>(), {context.in(0), context.grad_out(0)}, "swiglu.dx")[0]);
}

Cost SwiGlu::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape.numel());
  return {2.5 * n, 1.5 * n * static_cast<double>(size_of(in[0].dtype))};
}

void SwiGlu::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.out[0].shape()[1];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* x = args.in[0].as<T>();
    T* y = args.out[0].as<T>();
    parallel_for(n, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        for_vectors<T>(width, [&](std::int64_t c, std::int64_t lanes) {
          const auto gate = load_lanes(x + r * 2 * width + c, lanes);
          const auto up = load_lanes(x + r * 2 * width + width + c, lanes);
          store_lanes<T>(y + r * width + c, lanes, gate * sigmoid<T>(gate) * up);
        });
    });
  });
}

std::vector<TensorSpec> SwiGluGradient::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 2);
  expect_same_real(name(), in);
  expect_shape(name(), "dy", in[1], {in[0].shape[0], in[0].shape[1] / 2});
  return {in[0]};
}

Cost SwiGluGradient::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape.numel());
  return {5.0 * n, 2.5 * n * static_cast<double>(size_of(in[0].dtype))};
}

void SwiGluGradient::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[1].shape()[0], width = args.in[1].shape()[1];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* x = args.in[0].as<T>();
    const T* dy = args.in[1].as<T>();
    T* dx = args.out[0].as<T>();
    parallel_for(n, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        for_vectors<T>(width, [&](std::int64_t c, std::int64_t lanes) {
          const std::int64_t g = r * 2 * width + c, u = g + width;
          const auto gate = load_lanes(x + g, lanes), up = load_lanes(x + u, lanes);
          const auto d = load_lanes(dy + r * width + c, lanes);
          const auto s = sigmoid<T>(gate);
          store_lanes<T>(dx + g, lanes, d * up * s * (T(1) + gate * (T(1) - s)));
          store_lanes<T>(dx + u, lanes, d * gate * s);
        });
    });
  });
}

}  // namespace kiln

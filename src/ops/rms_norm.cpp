#include "ops/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "ops/checks.h"
#include "ops/rms_scale.h"
#include "ops/simd.h"

namespace kiln {
namespace {

/// Rows whose dw are summed together; a fixed number, so that the sum does not depend on the threads.
constexpr std::int64_t kRowsPerPart = 64;

std::int64_t part_count(std::int64_t rows) { return (rows + kRowsPerPart - 1) / kRowsPerPart; }

/// sum_i a_i b_i in vector lanes, then across lanes in order.
template <typename T>
T dot(const T* a, const T* b, std::int64_t n) {
  simd::Vector<T> sum{};
  std::int64_t i = 0;
  for (; i + simd::kLanes<T> <= n; i += simd::kLanes<T>) sum += simd::load(a + i) * simd::load(b + i);
  T total = simd::reduce_sum<T>(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace

RmsNorm::RmsNorm(Options options) : options_(options) {
  check(options.eps > 0, "rms_norm: eps {}, expected a positive number", options.eps);
}

std::vector<TensorSpec> RmsNorm::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, options_.residual ? 3 : 2);
  expect_same_real(name(), in);
  expect_rank(name(), "x", in[0], 2);
  expect_shape(name(), "w", in[1], {in[0].shape[1]});
  const TensorSpec rstd{{in[0].shape[0]}, accumulator_of(in[0].dtype)};
  if (!options_.residual) return {in[0], rstd};
  expect_shape(name(), "delta", in[2], in[0].shape);
  return {in[0], rstd, in[0]};
}

void RmsNorm::gradient(GradientContext& context) const {
  const ValueId r = options_.residual ? context.out(2) : context.in(0);
  std::vector<ValueId> inputs{r, context.in(1), context.out(1), context.grad_out(0)};
  const ValueId arriving = options_.residual ? context.grad_out(2) : context.grad_in(0);
  if (arriving.valid()) inputs.push_back(arriving);
  const auto out = context.add(std::make_shared<RmsNormGradient>(), inputs, "norm.dx");
  if (context.needs_gradient(0)) {
    if (options_.residual)
      context.set_grad_in(0, out[0]);
    else
      context.replace_grad_in(0, out[0]);
  }
  if (options_.residual && context.needs_gradient(2)) context.set_grad_in(2, out[0]);
  if (context.needs_gradient(1)) context.set_grad_in(1, out[1]);
}

ValueId RmsNorm::recompute(GradientContext& context, int output) const {
  const ValueId r = options_.residual ? context.out(2) : context.in(0), rstd = context.out(1);
  if (output != 0 || context.is_recomputed(r) || context.is_recomputed(rstd)) return {};
  return context.add(std::make_shared<RmsScale>(), {r, context.in(1), rstd}, "norm.again")[0];
}

Cost RmsNorm::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape.numel());
  return {4.0 * n, (options_.residual ? 4.0 : 2.0) * n * static_cast<double>(size_of(in[0].dtype))};
}

void RmsNorm::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* x = args.in[0].as<T>();
    const T* w = args.in[1].as<T>();
    const T* delta = options_.residual ? args.in[2].as<T>() : nullptr;
    T* y = args.out[0].as<T>();
    T* rstd = args.out[1].as<T>();
    T* sum = options_.residual ? args.out[2].as<T>() : nullptr;
    parallel_for(n, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const T* row = x + i * width;
        if (sum != nullptr) {
          T* r = sum + i * width;
          for (std::int64_t c = 0; c < width; ++c) r[c] = row[c] + delta[i * width + c];
          row = r;
        }
        const T scale = T(1) / std::sqrt(dot(row, row, width) / static_cast<T>(width) + static_cast<T>(options_.eps));
        rstd[i] = scale;
        for (std::int64_t c = 0; c < width; ++c) y[i * width + c] = row[c] * scale * w[c];
      }
    });
  });
}

std::vector<TensorSpec> RmsNormGradient::infer(std::span<const TensorSpec> in) const {
  check(in.size() == 4 || in.size() == 5, "rms_norm_dx: expected 4 or 5 inputs, found {}", in.size());
  for (std::size_t i = 0; i < in.size(); ++i)
    expect_dtype(name(), "an input", in[i], i == 2 ? accumulator_of(in[0].dtype) : in[0].dtype);
  for (std::size_t i = 3; i < in.size(); ++i) expect_shape(name(), "dy", in[i], in[0].shape);
  return {in[0], {in[1].shape, accumulator_of(in[1].dtype)}};
}

std::size_t RmsNormGradient::workspace_bytes(std::span<const TensorSpec> in) const {
  return static_cast<std::size_t>(part_count(in[0].shape[0])) * in[1].bytes();
}

Cost RmsNormGradient::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape.numel());
  return {8.0 * n, static_cast<double>(in.size() - 1) * n * static_cast<double>(size_of(in[0].dtype))};
}

// With z = r * rstd and g = dy * w: dr = rstd * (g - z * mean(g z)), dw = sum_N dy z.
void RmsNormGradient::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1], parts = part_count(n);
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* r = args.in[0].as<T>();
    const T* w = args.in[1].as<T>();
    const T* rstd = args.in[2].as<T>();
    const T* dy = args.in[3].as<T>();
    const T* arriving = args.in.size() == 5 ? args.in[4].as<T>() : nullptr;
    T* dx = args.out[0].as<T>();
    T* dw = args.out[1].as<T>();
    T* partial = static_cast<T*>(args.workspace.data);
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = begin; part < end; ++part) {
        T* sum = partial + part * width;
        std::fill(sum, sum + width, T(0));
        for (std::int64_t i = part * kRowsPerPart; i < std::min(n, (part + 1) * kRowsPerPart); ++i) {
          const T *row = r + i * width, *d = dy + i * width;
          T* out = dx + i * width;
          const T scale = rstd[i];
          for (std::int64_t c = 0; c < width; ++c) {
            sum[c] += d[c] * row[c] * scale;
            out[c] = d[c] * w[c];
          }
          const T mean = dot(out, row, width) * scale * scale * scale / static_cast<T>(width);
          if (arriving == nullptr)
            for (std::int64_t c = 0; c < width; ++c) out[c] = out[c] * scale - row[c] * mean;
          else
            for (std::int64_t c = 0; c < width; ++c) out[c] = out[c] * scale - row[c] * mean + arriving[i * width + c];
        }
      }
    });
    for (std::int64_t c = 0; c < width; ++c) {
      T total = args.accumulate ? dw[c] : T(0);
      for (std::int64_t part = 0; part < parts; ++part) total += partial[part * width + c];
      dw[c] = total;
    }
  });
}

}  // namespace kiln

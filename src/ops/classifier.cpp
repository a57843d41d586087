#include "ops/classifier.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "graph/parameter.h"
#include "ops/checks.h"
#include "ops/gemm.h"
#include "ops/simd.h"

namespace kiln {
namespace {

/// Cross-entropy of one row of logits. When `gradient` is set the row becomes scale * (softmax - onehot(target)).
template <typename T>
T cross_entropy_row(T* row, std::int64_t vocab, std::int32_t target, bool gradient, T scale) {
  constexpr int kLanes = simd::kLanes<T>;
  if (target == Classifier::kIgnoredTarget) {
    if (gradient) std::fill(row, row + vocab, T(0));
    return 0;
  }
  simd::Vector<T> most = simd::broadcast(row[0]);
  std::int64_t j = 0;
  for (; j + kLanes <= vocab; j += kLanes) most = simd::max<T>(most, simd::load(row + j));
  T peak = simd::reduce_max<T>(most);
  for (; j < vocab; ++j) peak = std::max(peak, row[j]);

  const T logit = row[target];
  simd::Vector<T> sum{};
  for (j = 0; j + kLanes <= vocab; j += kLanes) {
    const simd::Vector<T> e = simd::exp<T>(simd::load(row + j) - peak);
    if (gradient) simd::store<T>(row + j, e);
    sum += e;
  }
  T total = simd::reduce_sum<T>(sum);
  for (; j < vocab; ++j) {
    const T e = std::exp(row[j] - peak);
    if (gradient) row[j] = e;
    total += e;
  }
  if (gradient) {
    const T factor = scale / total;
    for (j = 0; j < vocab; ++j) row[j] *= factor;
    row[target] -= scale;
  }
  return std::log(total) + peak - logit;
}

}  // namespace

std::vector<TensorSpec> Classifier::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 4);
  expect_same_real(name(), in.first(2));
  expect_rank(name(), "x", in[0], 2);
  expect_rank(name(), "w", in[1], 2);
  check(in[0].shape[1] == in[1].shape[1], "{}: inner sizes {} and {} (x {} · w {}')", name(), in[0].shape[1],
        in[1].shape[1], in[0].shape.str(), in[1].shape.str());
  expect_shape(name(), "targets", in[2], {in[0].shape[0]});
  expect_dtype(name(), "targets", in[2], DType::i32);
  check(in[3] == scalars_spec(), "{}: scalars have shape {}, expected {}", name(), in[3].shape.str(),
        scalars_spec().shape.str());
  const TensorSpec losses{{in[0].shape[0]}, in[0].dtype};
  if (!options_.gradient) return {losses};
  return {losses, in[0], in[1]};
}

void Classifier::gradient(GradientContext& context) const {
  check(options_.gradient, "classifier: recorded without its gradient; record it with .gradient = true to train");
  if (context.needs_gradient(0)) context.set_grad_in(0, context.out(1));
  if (context.needs_gradient(1)) context.set_grad_in(1, context.out(2));
}

std::int64_t Classifier::chunk_tokens(std::int64_t width) const {
  if (options_.chunk_tokens > 0) return options_.chunk_tokens;
  return width < 256 ? 96 : 252;
}

std::size_t Classifier::workspace_bytes(std::span<const TensorSpec> in) const {
  const std::int64_t rows = std::min(chunk_tokens(in[0].shape[1]), in[0].shape[0]);
  return static_cast<std::size_t>(rows * in[1].shape[0]) * size_of(in[0].dtype);
}

Cost Classifier::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape[0]), c = static_cast<double>(in[0].shape[1]);
  const double v = static_cast<double>(in[1].shape[0]), passes = options_.gradient ? 3.0 : 1.0;
  return {2.0 * passes * n * c * v, passes * (n * c + v * c) * static_cast<double>(size_of(in[0].dtype))};
}

void Classifier::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1], vocab = args.in[1].shape()[0];
  const std::int64_t chunk = chunk_tokens(width);
  const std::int32_t* targets = args.in[2].as<std::int32_t>();
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* w = args.in[1].as<T>();
    T* losses = args.out[0].as<T>();
    T* logits = static_cast<T*>(args.workspace.data);
    const T scale = static_cast<T>(scalar(args.in[3], Scalar::loss_scale));
    for (std::int64_t first = 0; first < n; first += chunk) {
      const std::int64_t rows = std::min(chunk, n - first);
      const T* x = args.in[0].as<T>() + first * width;
      gemm<T>({.trans_b = Trans::yes,
               .m = rows,
               .n = vocab,
               .k = width,
               .a = x,
               .lda = width,
               .b = w,
               .ldb = width,
               .c = logits,
               .ldc = vocab});
      parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
          losses[first + i] =
              cross_entropy_row(logits + i * vocab, vocab, targets[first + i], options_.gradient, scale);
      });
      if (!options_.gradient) continue;
      gemm<T>({.m = rows,
               .n = width,
               .k = vocab,
               .a = logits,
               .lda = vocab,
               .b = w,
               .ldb = width,
               .c = args.out[1].as<T>() + first * width,
               .ldc = width});
      const bool accumulate = args.accumulate || first > 0;
      gemm<T>({.trans_a = Trans::yes,
               .m = vocab,
               .n = width,
               .k = rows,
               .a = logits,
               .lda = vocab,
               .b = x,
               .ldb = width,
               .c = args.out[2].as<T>(),
               .ldc = width,
               .beta = accumulate ? T(1) : T(0)});
    }
  });
}

}  // namespace kiln

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

/// Softmax of one row of logits, left unnormalised: the row becomes e^(logit - max) when `keep` is set.
template <typename T>
struct RowSoftmax {
  T peak, sum;
};
template <typename T>
RowSoftmax<T> softmax_row(T* row, std::int64_t vocab, bool keep) {
  constexpr int kLanes = simd::kLanes<T>;
  simd::Vector<T> most = simd::broadcast(row[0]);
  std::int64_t j = 0;
  for (; j + kLanes <= vocab; j += kLanes) most = simd::max<T>(most, simd::load(row + j));
  T peak = simd::reduce_max<T>(most);
  for (; j < vocab; ++j) peak = std::max(peak, row[j]);

  simd::Vector<T> sum{};
  for (j = 0; j + kLanes <= vocab; j += kLanes) {
    const simd::Vector<T> e = simd::exp<T>(simd::load(row + j) - peak);
    if (keep) simd::store<T>(row + j, e);
    sum += e;
  }
  T total = simd::reduce_sum<T>(sum);
  for (; j < vocab; ++j) {
    const T e = std::exp(row[j] - peak);
    if (keep) row[j] = e;
    total += e;
  }
  return {peak, total};
}

/// One chunk of tokens. With e the unnormalised softmax and f = scale / sum(e) of a row, dlogits = f e - scale onehot,
/// so
///   dx = f (e W) - scale W[target],   dw = e' (f x) - scale x at row target:
/// the rows of logits are scaled through the narrow x and dx, not in a pass of their own.
template <typename T>
struct Chunk {
  std::int64_t rows, width, vocab;
  const T *x, *w;
  const std::int32_t* targets;
  T *logits, *scaled_x, *factor;  // scratch: [rows,V], [rows,C], [rows]
  T scale;
  bool gradient;

  void losses(T* out) const {
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
      for (std::int64_t i = begin; i < end; ++i) {
        const bool counts = targets[i] != Classifier::kIgnoredTarget;
        const T logit = counts ? logits[i * vocab + targets[i]] : T(0);
        const RowSoftmax<T> row = softmax_row(logits + i * vocab, vocab, gradient);
        out[i] = counts ? std::log(row.sum) + row.peak - logit : T(0);
        factor[i] = counts ? scale / row.sum : T(0);
      }
    });
  }

  void input_gradient(T* dx) const {
    gemm<T>(
        {.m = rows, .n = width, .k = vocab, .a = logits, .lda = vocab, .b = w, .ldb = width, .c = dx, .ldc = width});
    for (std::int64_t i = 0; i < rows; ++i) {
      const bool counts = targets[i] != Classifier::kIgnoredTarget;
      const T* target = w + (counts ? targets[i] : 0) * width;
      const T share = counts ? scale : T(0);
      for (std::int64_t c = 0; c < width; ++c) {
        dx[i * width + c] = factor[i] * dx[i * width + c] - share * target[c];
        scaled_x[i * width + c] = factor[i] * x[i * width + c];
      }
    }
  }

  void weight_gradient(T* dw, bool accumulate) const {
    gemm<T>({.trans_a = Trans::yes,
             .m = vocab,
             .n = width,
             .k = rows,
             .a = logits,
             .lda = vocab,
             .b = scaled_x,
             .ldb = width,
             .c = dw,
             .ldc = width,
             .beta = accumulate ? T(1) : T(0)});
    for (std::int64_t i = 0; i < rows; ++i) {
      if (targets[i] == Classifier::kIgnoredTarget) continue;
      for (std::int64_t c = 0; c < width; ++c) dw[targets[i] * width + c] -= scale * x[i * width + c];
    }
  }
};

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
  check(options_.valid_vocab >= 0 && options_.valid_vocab <= in[1].shape[0], "{}: {} classes in w of shape {}", name(),
        options_.valid_vocab, in[1].shape.str());
  const DType sums = accumulator_of(in[0].dtype);
  const TensorSpec losses{{in[0].shape[0]}, sums};
  if (!options_.gradient) return {losses};
  return {losses, in[0], {in[1].shape, sums}};
}

void Classifier::gradient(GradientContext& context) const {
  check(options_.gradient, "classifier: recorded without its gradient; record it with .gradient = true to train");
  if (context.needs_gradient(0)) context.set_grad_in(0, context.out(1));
  if (context.needs_gradient(1)) context.set_grad_in(1, context.out(2));
}

std::size_t Classifier::workspace_bytes(std::span<const TensorSpec> in) const {
  const std::int64_t rows = std::min(options_.chunk_tokens, in[0].shape[0]);
  return static_cast<std::size_t>(rows * (in[1].shape[0] + in[0].shape[1] + 1)) * size_of(in[0].dtype);
}

Cost Classifier::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape[0]), c = static_cast<double>(in[0].shape[1]);
  const double v = static_cast<double>(in[1].shape[0]), passes = options_.gradient ? 3.0 : 1.0;
  return {2.0 * passes * n * c * v, passes * (n * c + v * c) * static_cast<double>(size_of(in[0].dtype))};
}

void Classifier::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1], vocab = args.in[1].shape()[0];
  const std::int64_t most = std::min(options_.chunk_tokens, n);
  check(options_.valid_vocab == 0 || options_.valid_vocab == vocab, "{}: no padded vocabulary on the CPU", name());
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    T* const logits = static_cast<T*>(args.workspace.data);
    for (std::int64_t first = 0; first < n; first += most) {
      const Chunk<T> chunk{.rows = std::min(most, n - first),
                           .width = width,
                           .vocab = vocab,
                           .x = args.in[0].as<T>() + first * width,
                           .w = args.in[1].as<T>(),
                           .targets = args.in[2].as<std::int32_t>() + first,
                           .logits = logits,
                           .scaled_x = logits + most * vocab,
                           .factor = logits + most * (vocab + width),
                           .scale = static_cast<T>(scalar(args.in[3], Scalar::loss_scale)),
                           .gradient = options_.gradient};
      chunk.losses(args.out[0].as<T>() + first);
      if (!options_.gradient) continue;
      chunk.input_gradient(args.out[1].as<T>() + first * width);
      chunk.weight_gradient(args.out[2].as<T>(), args.accumulate || first > 0);
    }
  });
}

}  // namespace kiln

#include "optim/muon.h"

#include <cmath>

#include "core/parallel.h"
#include "ops/gemm.h"
#include "optim/squared_sum.h"

namespace kiln {
namespace {

constexpr double kA = kNewtonSchulz[0], kB = kNewtonSchulz[1], kC = kNewtonSchulz[2];

StateStore momentum_store(const Parameter& parameter, const MuonUpdate::Options& o) {
  return StateStore(parameter, {.name = "momentum", .shape = parameter.shape, .precision = o.states, .seed = o.seed});
}

/// to [columns, rows] = the transpose of from [rows, columns]
template <typename T>
void transpose(std::int64_t rows, std::int64_t columns, const T* from, T* to) {
  parallel_for(columns, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = begin; j < end; ++j) to[j * rows + i] = from[i * columns + j];
  });
}

/// The sum of rows' squares, in an order that the sizes decide.
template <typename T>
double squared_norm(std::int64_t rows, std::int64_t columns, const T* x) {
  double total = 0;
  for (std::int64_t i = 0; i < rows; ++i) total += squared_sum(x + i * columns, columns);
  return total;
}

}  // namespace

template <typename T>
void orthogonalise(std::int64_t m, std::int64_t n, T* x, T* copy, T* grams) {
  T *gram = grams, *square = gram + m * m;
  const T inverse = static_cast<T>(1.0 / (std::sqrt(squared_norm(m, n, x)) + 1e-7));
  scale_weights(m * n, inverse, x);
  for (int k = 0; k < kNewtonSchulzSteps; ++k) {
    gemm<T>({.trans_b = Trans::yes, .m = m, .n = m, .k = n, .a = x, .lda = n, .b = x, .ldb = n, .c = gram, .ldc = m});
    // b A + c A A in one product: A symmetric.
    std::copy(gram, gram + m * m, square);
    gemm<T>({.m = m,
             .n = m,
             .k = m,
             .a = gram,
             .lda = m,
             .b = gram,
             .ldb = m,
             .c = square,
             .ldc = m,
             .alpha = static_cast<T>(kC),
             .beta = static_cast<T>(kB)});
    std::copy(x, x + m * n, copy);
    gemm<T>({.m = m,
             .n = n,
             .k = m,
             .a = square,
             .lda = m,
             .b = copy,
             .ldb = n,
             .c = x,
             .ldc = n,
             .alpha = 1,
             .beta = static_cast<T>(kA)});
  }
}

MuonUpdate::MuonUpdate(Parameter parameter, const Options& options)
    : UpdateOp(std::move(parameter)), options_(options), momentum_(momentum_store(this->parameter(), options)) {
  check_matrix(this->parameter());
}

std::vector<StateSpec> MuonUpdate::states(const Parameter& parameter, const Options& options) {
  std::vector<StateSpec> list;
  momentum_store(parameter, options).append_specs(list);
  return list;
}

double MuonUpdate::scale() const {
  const Shape& own = parameter().own_shape();
  const double m = static_cast<double>(own[0]), n = static_cast<double>(own[1]);
  return options_.scale == MuonScale::match_rms ? 0.2 * std::sqrt(std::max(m, n)) : std::sqrt(std::max(1.0, m / n));
}

std::size_t MuonUpdate::workspace_bytes(std::span<const TensorSpec> in) const {
  const std::int64_t m = parameter().shape[0], n = parameter().shape[1], side = std::min(m, n);
  // U, its transpose or copy, and two Gram matrices
  return size_of(in[0].dtype) * static_cast<std::size_t>(2 * m * n + 2 * side * side);
}

Cost MuonUpdate::cost(std::span<const TensorSpec>) const {
  const double m = static_cast<double>(parameter().shape[0]), n = static_cast<double>(parameter().shape[1]);
  const double side = std::min(m, n);
  return {kNewtonSchulzSteps * (4.0 * side * m * n + 2.0 * side * side * side), 20.0 * m * n};
}

void MuonUpdate::update(const UpdateArgs& args) const {
  visit_real(args.w.dtype(), [&]<typename T>() { update_as<T>(args); });
}

template <typename T>
void MuonUpdate::update_as(const UpdateArgs& args) const {
  const std::int64_t m = parameter().shape[0], n = parameter().shape[1], count = m * n;
  const double lr = scalar(args.scalars, Scalar::lr);
  const T clip = static_cast<T>(scalar(args.scalars, Scalar::clip_scale)), mu = static_cast<T>(options_.momentum);
  std::span<const Tensor> states = args.states;
  const StateView<T> stored = momentum_.view<T>(states, static_cast<std::int64_t>(scalar(args.scalars, Scalar::step)));
  const T* g = args.g.as<T>();
  T *u = static_cast<T*>(args.workspace.data), *other = u + count, *grams = other + count;

  parallel_for((count + kStateBlock - 1) / kStateBlock, kStateGrain, [&](std::int64_t begin, std::int64_t end) {
    T buffer[kStateBlock];
    for (std::int64_t at = begin * kStateBlock; at < std::min(end * kStateBlock, count); at += kStateBlock) {
      const std::int64_t size = std::min(kStateBlock, count - at);
      T* b = stored.load(at, size, buffer);
      for (std::int64_t i = 0; i < size; ++i) {
        const T x = clip * g[at + i];
        b[i] = mu * b[i] + x;
        u[at + i] = x + mu * b[i];
      }
      stored.store(at, size, b);
    }
  });
  const bool tall = m > n;
  if (tall) {
    transpose(m, n, u, other);
    orthogonalise(n, m, other, u, grams);
    transpose(n, m, other, u);
  } else {
    orthogonalise(m, n, u, other, grams);
  }
  const T keep = static_cast<T>(parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0);
  const T rate = static_cast<T>(lr * scale());
  T* w = args.w.as<T>();
  parallel_for(count, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) w[i] = keep * w[i] - rate * u[i];
  });
}

std::unique_ptr<Optimizer> make_muon(const OptimizerOptions& o) {
  return std::make_unique<SplitOptimizer<MuonUpdate>>(o.kind,
                                                      MuonUpdate::Options{.momentum = o.momentum,
                                                                          .weight_decay = o.weight_decay,
                                                                          .scale = o.muon_scale,
                                                                          .seed = o.seed,
                                                                          .states = o.states},
                                                      adam_options(o, AdamForm::pytorch, o.states));
}

template void orthogonalise(std::int64_t, std::int64_t, float*, float*, float*);
template void orthogonalise(std::int64_t, std::int64_t, double*, double*, double*);

}  // namespace kiln

#include "optim/projector.h"

#include <Eigen/Dense>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "base/rng.h"
#include "core/parallel.h"
#include "ops/gemm.h"
#include "optim/orthonormal.h"

namespace kiln {
namespace {

using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic>;
template <typename T>
using RowMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr std::int64_t kOversampling = 8;

/// x <- G (G' x) on the shorter side: x [short, columns], inner [long, columns].
template <typename T>
void apply_gram(const Tensor& g, std::int64_t columns, T* x, T* inner) {
  const std::int64_t m = g.shape()[0], n = g.shape()[1];
  const bool right = projection_side(g.shape()) == ProjectionSide::right;
  const T* data = g.as<T>();
  gemm<T>({.trans_a = right ? Trans::no : Trans::yes,
           .m = right ? m : n,
           .n = columns,
           .k = right ? n : m,
           .a = data,
           .lda = n,
           .b = x,
           .ldb = columns,
           .c = inner,
           .ldc = columns});
  gemm<T>({.trans_a = right ? Trans::yes : Trans::no,
           .m = right ? n : m,
           .n = columns,
           .k = right ? m : n,
           .a = data,
           .lda = n,
           .b = inner,
           .ldb = columns,
           .c = x,
           .ldc = columns});
}

/// `passes` times x <- orth(G (G' x)) on the shorter side; x [short, columns]. The workspace holds what
/// power_workspace_bytes counts.
template <typename T>
void power_passes(const Tensor& g, std::int64_t columns, int passes, T* x, void* workspace) {
  const bool right = projection_side(g.shape()) == ProjectionSide::right;
  const std::int64_t m = g.shape()[0], n = g.shape()[1], side = right ? n : m;
  auto* wide = static_cast<double*>(workspace);
  double* factor = wide + side * columns;
  T* inner = reinterpret_cast<T*>(factor + orthonormal_workspace(columns));
  for (int pass = 0; pass < passes; ++pass) {
    apply_gram(g, columns, x, inner);
    std::copy(x, x + side * columns, wide);
    orthonormalise(side, columns, wide, factor);
    std::copy(wide, wide + side * columns, x);
  }
}

template <typename T>
std::size_t power_workspace_bytes(const Shape& shape, std::int64_t columns) {
  const std::int64_t side = std::min(shape[0], shape[1]), length = std::max(shape[0], shape[1]);
  return sizeof(double) * static_cast<std::size_t>(side * columns + orthonormal_workspace(columns)) +
         sizeof(T) * static_cast<std::size_t>(length * columns);
}

template <typename T>
RowMatrix<T> cold_basis(const Tensor& g, std::int64_t side, std::int64_t rank, const RefreshOptions& options) {
  const std::int64_t width = std::min(side, rank + kOversampling);
  const Philox random(options.seed, options.stream);
  RowMatrix<T> x(side, width);
  for (Eigen::Index i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<T>(random.normal(static_cast<std::uint64_t>(i)));
  const Buffer workspace(power_workspace_bytes<T>(g.shape(), width), "the projector's cold start");
  power_passes<T>(g, width, options.passes, x.data(), workspace.data());
  // Rayleigh-Ritz: the best `rank` directions within the range found.
  RowMatrix<T> y = x;
  apply_gram<T>(g, width, y.data(), reinterpret_cast<T*>(workspace.data()));
  const RowMatrix<T> small = x.transpose() * y;
  const Eigen::SelfAdjointEigenSolver<MatrixD> ritz(((small + small.transpose()) / T(2)).template cast<double>());
  return x * ritz.eigenvectors().rightCols(rank).rowwise().reverse().template cast<T>();
}

template <typename T>
bool all_finite(const T* x, std::int64_t n) {
  std::atomic<bool> finite{true};
  parallel_for(n, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    int bad = 0;
    for (std::int64_t i = begin; i < end; ++i) bad |= !(std::abs(x[i]) <= std::numeric_limits<T>::max());
    if (bad != 0) finite = false;
  });
  return finite;
}

template <typename T>
RowMatrix<T> exact_basis(const Tensor& g, std::int64_t side, std::int64_t rank) {
  const Eigen::Map<const RowMatrix<T>> map(g.as<T>(), g.shape()[0], g.shape()[1]);
  const MatrixD wide = map.template cast<double>();
  MatrixD gram(side, side);
  if (projection_side(g.shape()) == ProjectionSide::right)
    gram.noalias() = wide.transpose() * wide;
  else
    gram.noalias() = wide * wide.transpose();
  const Eigen::SelfAdjointEigenSolver<MatrixD> solver(gram);
  MatrixD basis = solver.eigenvectors().rightCols(rank).rowwise().reverse();
  for (Eigen::Index j = 0; j < rank; ++j) {
    Eigen::Index largest = 0;
    basis.col(j).cwiseAbs().maxCoeff(&largest);
    if (basis(largest, j) < 0) basis.col(j) = -basis.col(j);
  }
  return basis.template cast<T>();
}

}  // namespace

ProjectionSide projection_side(const Shape& shape) {
  return shape[0] >= shape[1] ? ProjectionSide::right : ProjectionSide::left;
}

RefreshSchedule refresh_schedule(const Parameter& parameter, std::int64_t interval, bool stagger) {
  return {.interval = interval, .offset = stagger ? parameter.low_rank_index * interval / parameter.low_rank_count : 0};
}

std::size_t refresh_workspace_bytes(const Shape& shape, std::int64_t rank, DType dtype) {
  return visit_real(dtype, [&]<typename T>() { return power_workspace_bytes<T>(shape, rank); });
}

bool refresh_projector(const Tensor& g, const Tensor& q, const RefreshOptions& options, void* workspace) {
  const std::int64_t side = q.shape()[0], rank = q.shape()[1];
  return visit_real(g.dtype(), [&]<typename T>() {
    if (!all_finite(g.as<T>(), g.numel())) return false;
    Eigen::Map<RowMatrix<T>> basis(q.as<T>(), side, rank);
    if (options.kind == ProjectorKind::svd)
      basis = exact_basis<T>(g, side, rank);
    else if (options.cold)
      basis = cold_basis<T>(g, side, rank, options);
    else
      power_passes<T>(g, rank, options.passes, q.as<T>(), workspace);
    return true;
  });
}

}  // namespace kiln

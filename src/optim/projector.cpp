#include "optim/projector.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "base/rng.h"
#include "ops/gemm.h"

namespace kiln {
namespace {

using MatrixD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic>;
template <typename T>
using RowMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr std::int64_t kOversampling = 8;
constexpr int kPowerPasses = 2;

/// y = G (G' x) on the shorter side: x and y are [short, columns].
template <typename T>
RowMatrix<T> apply_gram(const Tensor& g, const RowMatrix<T>& x) {
  const std::int64_t m = g.shape()[0], n = g.shape()[1], columns = x.cols();
  const bool right = projection_side(g.shape()) == ProjectionSide::right;
  const T* data = g.as<T>();
  RowMatrix<T> inner(right ? m : n, columns), y(x.rows(), columns);
  const Trans first = right ? Trans::no : Trans::yes, second = right ? Trans::yes : Trans::no;
  gemm<T>({.trans_a = first,
           .m = inner.rows(),
           .n = columns,
           .k = x.rows(),
           .a = data,
           .lda = n,
           .b = x.data(),
           .ldb = columns,
           .c = inner.data(),
           .ldc = columns});
  gemm<T>({.trans_a = second,
           .m = y.rows(),
           .n = columns,
           .k = inner.rows(),
           .a = data,
           .lda = n,
           .b = inner.data(),
           .ldb = columns,
           .c = y.data(),
           .ldc = columns});
  return y;
}

/// Orthonormal basis of the columns, each column's sign such that it points along the column it came from.
template <typename T>
RowMatrix<T> orthonormal(const RowMatrix<T>& y) {
  const Eigen::HouseholderQR<Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>> qr(y);
  Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic> q =
      qr.householderQ() * Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>::Identity(y.rows(), y.cols());
  for (Eigen::Index j = 0; j < y.cols(); ++j)
    if (qr.matrixQR()(j, j) < T(0)) q.col(j) = -q.col(j);
  return q;
}

template <typename T>
RowMatrix<T> cold_basis(const Tensor& g, std::int64_t side, std::int64_t rank, const RefreshOptions& options) {
  const std::int64_t width = std::min(side, rank + kOversampling);
  const Philox random(options.seed, options.stream);
  RowMatrix<T> x(side, width);
  for (Eigen::Index i = 0; i < x.size(); ++i)
    x.data()[i] = static_cast<T>(random.normal(static_cast<std::uint64_t>(i)));
  for (int pass = 0; pass < kPowerPasses; ++pass) x = orthonormal<T>(apply_gram(g, x));
  // Rayleigh-Ritz: the best `rank` directions within the range found.
  const RowMatrix<T> small = x.transpose() * apply_gram(g, x);
  const Eigen::SelfAdjointEigenSolver<MatrixD> ritz(((small + small.transpose()) / T(2)).template cast<double>());
  return x * ritz.eigenvectors().rightCols(rank).rowwise().reverse().template cast<T>();
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

void refresh_projector(const Tensor& g, const Tensor& q, const RefreshOptions& options) {
  const std::int64_t side = q.shape()[0], rank = q.shape()[1];
  visit_real(g.dtype(), [&]<typename T>() {
    Eigen::Map<RowMatrix<T>> basis(q.as<T>(), side, rank);
    const Eigen::Map<const Eigen::Array<T, Eigen::Dynamic, 1>> flat(g.as<T>(), g.numel());
    if (!flat.isFinite().all()) return;
    if (options.kind == ProjectorKind::svd) {
      basis = exact_basis<T>(g, side, rank);
    } else if (options.cold) {
      basis = cold_basis<T>(g, side, rank, options);
    } else {
      RowMatrix<T> x = basis;
      for (int pass = 0; pass < kPowerPasses; ++pass) x = orthonormal<T>(apply_gram(g, x));
      basis = x;
    }
  });
}

}  // namespace kiln

#include "optim/orthonormal.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "ops/gemm.h"

namespace kiln {
namespace {

// A pivot below this part of its column's square has lost what the second pass could repair.
constexpr double kLeastPivot = 1e-10;

/// Upper R [n,n] with R'R = gram, in place; false when a pivot is lost. `diagonal` [n] keeps the squares it started
/// from.
bool cholesky(std::int64_t n, double* gram, double* diagonal) {
  for (std::int64_t k = 0; k < n; ++k) diagonal[k] = gram[k * n + k];
  for (std::int64_t k = 0; k < n; ++k) {
    double* row = gram + k * n;
    if (!(row[k] > kLeastPivot * diagonal[k])) return false;
    const double inverse = 1.0 / std::sqrt(row[k]);
    for (std::int64_t j = k; j < n; ++j) row[j] *= inverse;
    parallel_for(n - k - 1, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = k + 1 + begin; i < k + 1 + end; ++i) {
        const double factor = row[i];
        for (std::int64_t j = i; j < n; ++j) gram[i * n + j] -= factor * row[j];
      }
    });
  }
  return true;
}

/// One pass: a <- a R^-1. False, with `a` as it was, when the Gram matrix is not definite.
bool cholesky_qr(std::int64_t rows, std::int64_t n, double* a, double* workspace) {
  double* gram = workspace;
  gemm<double>(
      {.trans_a = Trans::yes, .m = n, .n = n, .k = rows, .a = a, .lda = n, .b = a, .ldb = n, .c = gram, .ldc = n});
  if (!cholesky(n, gram, workspace + n * n)) return false;
  parallel_for(rows, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      double* x = a + i * n;
      for (std::int64_t k = 0; k < n; ++k) {
        const double* r = gram + k * n;
        const double value = x[k] /= r[k];
        for (std::int64_t j = k + 1; j < n; ++j) x[j] -= value * r[j];
      }
    }
  });
  return true;
}

/// Reflector j on columns [first, n): a -= tau v (v' a), where v is 1 at row j and column j of `a` below it.
void reflect(std::int64_t rows, std::int64_t n, double* a, std::int64_t j, double tau, std::int64_t first) {
  parallel_for(n - first, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = first + begin; c < first + end; ++c) {
      double dot = a[j * n + c];
      for (std::int64_t i = j + 1; i < rows; ++i) dot += a[i * n + j] * a[i * n + c];
      a[j * n + c] -= tau * dot;
      for (std::int64_t i = j + 1; i < rows; ++i) a[i * n + c] -= tau * dot * a[i * n + j];
    }
  });
}

}  // namespace

void orthonormalise_householder(std::int64_t rows, std::int64_t n, double* a, double* workspace) {
  double *tau = workspace, *sign = workspace + n;
  for (std::int64_t j = 0; j < n; ++j) {
    double below = 0;
    for (std::int64_t i = j + 1; i < rows; ++i) below += a[i * n + j] * a[i * n + j];
    const double top = a[j * n + j], norm = std::sqrt(top * top + below);
    tau[j] = 0;
    sign[j] = top < 0 ? -1 : 1;
    if (below == 0) continue;
    const double diagonal = top >= 0 ? -norm : norm;
    tau[j] = (diagonal - top) / diagonal;
    sign[j] = diagonal < 0 ? -1 : 1;
    for (std::int64_t i = j + 1; i < rows; ++i) a[i * n + j] /= top - diagonal;
    reflect(rows, n, a, j, tau[j], j + 1);
  }
  // Q, column by column from the last, over the reflectors.
  for (std::int64_t j = n - 1; j >= 0; --j) {
    reflect(rows, n, a, j, tau[j], j + 1);
    for (std::int64_t i = 0; i < j; ++i) a[i * n + j] = 0;
    a[j * n + j] = 1 - tau[j];
    for (std::int64_t i = j + 1; i < rows; ++i) a[i * n + j] *= -tau[j];
  }
  for (std::int64_t j = 0; j < n; ++j)
    if (sign[j] < 0)
      for (std::int64_t i = 0; i < rows; ++i) a[i * n + j] = -a[i * n + j];
}

void orthonormalise(std::int64_t rows, std::int64_t columns, double* a, double* workspace) {
  if (cholesky_qr(rows, columns, a, workspace) && cholesky_qr(rows, columns, a, workspace)) return;
  orthonormalise_householder(rows, columns, a, workspace);
}

}  // namespace kiln

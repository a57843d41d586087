#include "optim/orthonormal.h"

#include <cmath>
#include <vector>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"

using namespace kiln;

namespace {

using Matrix = std::vector<double>;

/// Random columns, the k-th of size scale^k and with a part along the first, so that they are ill-conditioned.
Matrix columns(std::int64_t rows, std::int64_t n, double scale, double along) {
  const Philox random(1, static_cast<std::uint64_t>(rows * 1000 + n));
  Matrix a(static_cast<std::size_t>(rows * n));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      const double first = random.normal(static_cast<std::uint64_t>(i * n));
      a[static_cast<std::size_t>(i * n + j)] =
          std::pow(scale, static_cast<double>(j)) *
          (random.normal(static_cast<std::uint64_t>(i * n + j)) * (j == 0 ? 1 : 1 - along) +
           (j == 0 ? 0 : along * first));
    }
  return a;
}

double at(const Matrix& a, std::int64_t n, std::int64_t i, std::int64_t j) {
  return a[static_cast<std::size_t>(i * n + j)];
}

double dot(const Matrix& a, const Matrix& b, std::int64_t rows, std::int64_t n, std::int64_t j, std::int64_t k) {
  double sum = 0;
  for (std::int64_t i = 0; i < rows; ++i) sum += at(a, n, i, j) * at(b, n, i, k);
  return sum;
}

Matrix run(Matrix a, std::int64_t rows, std::int64_t n, bool householder) {
  Matrix workspace(static_cast<std::size_t>(orthonormal_workspace(n)), NAN);
  (householder ? orthonormalise_householder : orthonormalise)(rows, n, a.data(), workspace.data());
  return a;
}

}  // namespace

TEST_CASE("both ways give the Q of a QR factorisation with a positive diagonal") {
  const bool householder = GENERATE(false, true);
  const std::int64_t rows = GENERATE(7, 64, 200), n = GENERATE(1, 6, 7);
  const double along = GENERATE(0.0, 0.9, 0.99999), scale = GENERATE(1.0, 0.03);
  INFO(householder << " " << rows << " x " << n << ", " << along << ", " << scale);
  const Matrix a = columns(rows, n, scale, along), q = run(a, rows, n, householder);
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t k = 0; k <= j; ++k) CHECK(dot(q, q, rows, n, j, k) == Approx(j == k ? 1 : 0).margin(1e-13));
    // R = Q'A is upper triangular with a positive diagonal, and QR is A.
    const double size = std::sqrt(dot(a, a, rows, n, j, j));
    CHECK(dot(q, a, rows, n, j, j) > 0);
    for (std::int64_t k = j + 1; k < n; ++k) CHECK(std::abs(dot(q, a, rows, n, k, j)) < 1e-12 * size);
  }
}

TEST_CASE("columns that depend on each other, or vanish, still get an orthonormal basis") {
  const std::int64_t rows = 40, n = 6;
  Matrix a = columns(rows, n, 1.0, 0.0);
  const int fault = GENERATE(0, 1, 2);
  for (std::int64_t i = 0; i < rows; ++i) {
    double* row = a.data() + i * n;
    if (fault == 0) row[3] = 2 * row[0] - row[1];
    if (fault == 1) row[2] = 0;
    if (fault == 2) std::fill(row, row + n, 0.0);
  }
  const Matrix q = run(a, rows, n, false);
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t k = 0; k <= j; ++k) CHECK(dot(q, q, rows, n, j, k) == Approx(j == k ? 1 : 0).margin(1e-13));
}

TEST_CASE("the basis is bitwise the same for any number of threads") {
  const int threads = thread_count();
  const Matrix a = columns(300, 130, 1.0, 0.5);
  set_thread_count(1);
  const Matrix one = run(a, 300, 130, false), reflected = run(a, 300, 130, true);
  for (const int count : {2, 5}) {
    set_thread_count(count);
    CHECK(run(a, 300, 130, false) == one);
    CHECK(run(a, 300, 130, true) == reflected);
  }
  set_thread_count(threads);
}

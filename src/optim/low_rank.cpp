#include "optim/low_rank.h"

#include <cmath>

#include "core/parallel.h"
#include "ops/gemm.h"
#include "optim/squared_sum.h"

namespace kiln {

void check_matrix(const Parameter& parameter) {
  check(parameter.shape.rank() == 2, "{}: shape {}, a low-rank update needs a matrix", parameter.name,
        parameter.shape.str());
}

template <typename T>
void project(const LowRankShape& at, const T* g, const T* q, T scale, T* r) {
  gemm<T>({.trans_a = at.right() ? Trans::no : Trans::yes,
           .m = at.vectors(),
           .n = at.rank,
           .k = at.short_side(),
           .a = g,
           .lda = at.n,
           .b = q,
           .ldb = at.rank,
           .c = r,
           .ldc = at.rank,
           .alpha = scale});
}

template <typename T>
void add_projected_back(const LowRankShape& at, const T* a, const T* q, T scale, T* w) {
  gemm<T>({.trans_b = Trans::yes,
           .m = at.m,
           .n = at.n,
           .k = at.rank,
           .a = at.right() ? a : q,
           .lda = at.rank,
           .b = at.right() ? q : a,
           .ldb = at.rank,
           .c = w,
           .ldc = at.n,
           .alpha = scale,
           .beta = 1});
}

template <typename T>
void squared_norms_of_rows(std::int64_t rows, std::int64_t columns, const T* x, double* sum) {
  parallel_for(rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) sum[i] = squared_sum(x + i * columns, columns);
  });
}

template <typename T>
void squared_norms_of_matrix(const LowRankShape& at, const T* g, double* sum) {
  if (at.right()) return squared_norms_of_rows(at.m, at.n, g, sum);
  parallel_for(at.n, 64, [&](std::int64_t begin, std::int64_t end) {
    std::fill(sum + begin, sum + end, 0.0);
    for (std::int64_t i = 0; i < at.m; ++i)
      for (std::int64_t j = begin; j < end; ++j) {
        const double value = static_cast<double>(g[i * at.n + j]);
        sum[j] += value * value;
      }
  });
}

template <typename T>
void subtract_scaled(const LowRankShape& at, const T* g, const T* factor, T scale, T keep, T* w) {
  parallel_for(at.m, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      T* row = w + i * at.n;
      const T* grad = g + i * at.n;
      if (at.right()) {
        const T step = scale * factor[i];
        for (std::int64_t j = 0; j < at.n; ++j) row[j] = keep * (row[j] - step * grad[j]);
      } else {
        for (std::int64_t j = 0; j < at.n; ++j) row[j] = keep * (row[j] - scale * factor[j] * grad[j]);
      }
    }
  });
}

template <typename T>
void scale_weights(std::int64_t count, T keep, T* w) {
  if (keep == T(1)) return;
  parallel_for(count, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) w[i] *= keep;
  });
}

template <typename T>
double limit_growth(double norm, double gamma, T& previous) {
  const double before = static_cast<double>(previous);
  const double limit = before > 0 ? std::max(norm / (before + 1e-8), gamma) / gamma : 1.0;
  previous = static_cast<T>(norm / limit);
  return limit;
}

template void project(const LowRankShape&, const float*, const float*, float, float*);
template void add_projected_back(const LowRankShape&, const float*, const float*, float, float*);
template void squared_norms_of_rows(std::int64_t, std::int64_t, const float*, double*);
template void squared_norms_of_matrix(const LowRankShape&, const float*, double*);
template void subtract_scaled(const LowRankShape&, const float*, const float*, float, float, float*);
template void scale_weights(std::int64_t, float, float*);
template double limit_growth(double, double, float&);
template void project(const LowRankShape&, const double*, const double*, double, double*);
template void add_projected_back(const LowRankShape&, const double*, const double*, double, double*);
template void squared_norms_of_rows(std::int64_t, std::int64_t, const double*, double*);
template void squared_norms_of_matrix(const LowRankShape&, const double*, double*);
template void subtract_scaled(const LowRankShape&, const double*, const double*, double, double, double*);
template void scale_weights(std::int64_t, double, double*);
template double limit_growth(double, double, double&);

}  // namespace kiln

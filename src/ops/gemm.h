#pragma once
#include <cstdint>

namespace kiln {

enum class Trans { no, yes };

/// C[m,n] = alpha * op(A)[m,k] * op(B)[k,n] + beta * C, row-major with leading dimensions (elements between rows).
/// Trans::yes says that the stored matrix is the transpose: A is [k,m] or B is [n,k]. beta 0 never reads C.
template <typename T>
struct GemmArgs {
  Trans trans_a = Trans::no, trans_b = Trans::no;
  std::int64_t m = 0, n = 0, k = 0;
  const T* a = nullptr;
  std::int64_t lda = 0;
  const T* b = nullptr;
  std::int64_t ldb = 0;
  T* c = nullptr;
  std::int64_t ldc = 0;
  T alpha = 1, beta = 0;
};

/// Threaded over C with parallel_for; the split and the order of sums over k depend on the sizes alone, so the result
/// is bitwise the same for any number of threads. No allocation after the first call of a thread. T = float or double.
template <typename T>
void gemm(const GemmArgs<T>& args);

/// The same on the calling thread alone, for use inside parallel_for.
template <typename T>
void gemm_single(const GemmArgs<T>& args);

extern template void gemm<float>(const GemmArgs<float>&);
extern template void gemm<double>(const GemmArgs<double>&);
extern template void gemm_single<float>(const GemmArgs<float>&);
extern template void gemm_single<double>(const GemmArgs<double>&);

}  // namespace kiln

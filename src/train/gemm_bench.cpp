#include <Eigen/Core>
#include <algorithm>
#include <chrono>

#include "core/parallel.h"
#include "ops/gemm.h"
#include "train/step_bench.h"

#ifdef KILN_WITH_OPENBLAS
#include <cblas.h>
#endif

namespace kiln {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Best rate of several calls, kept while libraries take turns.
struct Contender {
  GemmRate rate;
  void (*run)(const Matrix& a, const Matrix& b, Matrix& c);
};

void run_kiln(const Matrix& a, const Matrix& b, Matrix& c) {
  gemm<float>({.trans_b = Trans::yes,
               .m = a.rows(),
               .n = b.rows(),
               .k = a.cols(),
               .a = a.data(),
               .lda = a.cols(),
               .b = b.data(),
               .ldb = b.cols(),
               .c = c.data(),
               .ldc = c.cols()});
}

void run_eigen(const Matrix& a, const Matrix& b, Matrix& c) { c.noalias() = a * b.transpose(); }

#ifdef KILN_WITH_OPENBLAS
void run_openblas(const Matrix& a, const Matrix& b, Matrix& c) {
  const auto size = [](Eigen::Index i) { return static_cast<int>(i); };
  openblas_set_num_threads(thread_count());
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, size(a.rows()), size(b.rows()), size(a.cols()), 1.0f, a.data(),
              size(a.cols()), b.data(), size(b.cols()), 0.0f, c.data(), size(c.cols()));
}
#endif

std::vector<Contender> contenders() {
  std::vector<Contender> list{
      {{"kiln", 0}, run_kiln},
      {{fmt::format("Eigen {}.{}.{}", EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION), 0}, run_eigen}};
#ifdef KILN_WITH_OPENBLAS
  list.push_back({{"OpenBLAS", 0}, run_openblas});
#endif
  return list;
}

}  // namespace

std::vector<GemmRate> bench_gemm(std::int64_t m, std::int64_t n, std::int64_t k, int repeats) {
  Eigen::setNbThreads(thread_count());
  const Matrix a = Matrix::Random(m, k), b = Matrix::Random(n, k);
  Matrix c = Matrix::Zero(m, n);
  std::vector<Contender> list = contenders();
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  for (int r = 0; r < repeats; ++r)
    for (Contender& contender : list) {
      const auto begin = std::chrono::steady_clock::now();
      contender.run(a, b, c);
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      contender.rate.flops_per_s = std::max(contender.rate.flops_per_s, flops / seconds);
    }
  std::vector<GemmRate> rates;
  for (const Contender& contender : list) rates.push_back(contender.rate);
  return rates;
}

GemmRate gemm_ceiling() {
  const std::vector<GemmRate> rates = bench_gemm(2048, 2048, 2048, 3);
  return *std::max_element(rates.begin() + 1, rates.end(),
                           [](const GemmRate& a, const GemmRate& b) { return a.flops_per_s < b.flops_per_s; });
}

}  // namespace kiln

#include "ops/gemm.h"

#include <cmath>
#include <vector>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"
#include "ops/simd.h"

namespace kiln {
namespace {

struct Problem {
  std::int64_t m, n, k;
  Trans ta, tb;
  double alpha, beta;
};

/// A GEMM in padded storage; NaN in the padding, and in C where beta is 0, shows any stray read.
template <typename T>
struct Run {
  std::vector<T> a, b, c;
  GemmArgs<T> args;

  explicit Run(const Problem& p) {
    const std::int64_t pad = 3;
    const std::int64_t a_rows = p.ta == Trans::no ? p.m : p.k, a_columns = p.ta == Trans::no ? p.k : p.m;
    const std::int64_t b_rows = p.tb == Trans::no ? p.k : p.n, b_columns = p.tb == Trans::no ? p.n : p.k;
    a = filled(a_rows, a_columns, a_columns + pad, 1);
    b = filled(b_rows, b_columns, b_columns + pad, 2);
    c = filled(p.m, p.n, p.n + pad, 3);
    if (p.beta == 0)
      for (T& x : c) x = static_cast<T>(NAN);
    args = {.trans_a = p.ta,
            .trans_b = p.tb,
            .m = p.m,
            .n = p.n,
            .k = p.k,
            .a = a.data(),
            .lda = a_columns + pad,
            .b = b.data(),
            .ldb = b_columns + pad,
            .c = c.data(),
            .ldc = p.n + pad,
            .alpha = static_cast<T>(p.alpha),
            .beta = static_cast<T>(p.beta)};
  }

  static std::vector<T> filled(std::int64_t rows, std::int64_t columns, std::int64_t stride, std::uint64_t seed) {
    const Philox random(seed, 1);
    std::vector<T> x(static_cast<std::size_t>(rows * stride + 1), static_cast<T>(NAN));
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j)
        x[static_cast<std::size_t>(i * stride + j)] =
            static_cast<T>(2 * random.uniform(static_cast<std::uint64_t>(i * columns + j)) - 1);
    return x;
  }

  double expected(const Problem& p, std::int64_t i, std::int64_t j, const std::vector<T>& before) const {
    double sum = 0;
    for (std::int64_t l = 0; l < p.k; ++l) {
      const auto x = static_cast<std::size_t>(p.ta == Trans::no ? i * args.lda + l : l * args.lda + i);
      const auto y = static_cast<std::size_t>(p.tb == Trans::no ? l * args.ldb + j : j * args.ldb + l);
      sum += static_cast<double>(a[x]) * static_cast<double>(b[y]);
    }
    const double old =
        p.beta == 0 ? 0 : p.beta * static_cast<double>(before[static_cast<std::size_t>(i * args.ldc + j)]);
    return p.alpha * sum + old;
  }
};

template <typename T>
void check_problem(const Problem& p, double tolerance) {
  Run<T> run(p);
  const std::vector<T> before = run.c;
  gemm<T>(run.args);
  double worst = 0;
  for (std::int64_t i = 0; i < p.m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j) {
      const double error = std::abs(static_cast<double>(run.c[static_cast<std::size_t>(i * run.args.ldc + j)]) -
                                    run.expected(p, i, j, before));
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  INFO("m " << p.m << " n " << p.n << " k " << p.k << " trans " << int(p.ta == Trans::yes) << int(p.tb == Trans::yes));
  CHECK(worst <= tolerance * std::sqrt(static_cast<double>(p.k) + 1));
  for (std::int64_t i = 0; i < p.m; ++i)  // padding untouched
    CHECK(std::isnan(static_cast<double>(run.c[static_cast<std::size_t>(i * run.args.ldc + p.n)])));
}

std::vector<Problem> problems() {
  std::vector<Problem> list;
  const std::int64_t sizes[] = {1, 2, 7, 12, 13, 31, 33, 64, 100, 129};
  const Philox random(5, 5);
  for (std::uint64_t i = 0; i < 120; ++i) {
    auto pick = [&](std::uint64_t axis) { return sizes[random.bits(4 * i + axis) % std::size(sizes)]; };
    list.push_back({pick(0), pick(1), i % 10 == 0 ? 0 : pick(2) + (i % 17 == 0 ? 700 : 0),
                    i % 2 == 0 ? Trans::no : Trans::yes, i % 4 < 2 ? Trans::no : Trans::yes, i % 3 == 0 ? 1.0 : -0.5,
                    i % 5 == 0 ? 0.0 : (i % 5 == 1 ? 1.0 : 0.25)});
  }
  list.push_back({500, 800, 3, Trans::no, Trans::yes, 1, 1});
  list.push_back({490, 5, 30, Trans::yes, Trans::no, 1, 0});
  return list;
}

TEST_CASE("GEMM equals the plain sum over odd sizes, transposes, scales and strides") {
  for (const Problem& p : problems()) {
    check_problem<float>(p, 2e-6);
    check_problem<double>(p, 1e-14);
  }
}

TEST_CASE("GEMM is bitwise the same for any number of threads") {
  const int threads = thread_count();
  for (const Problem& p :
       {Problem{257, 130, 600, Trans::no, Trans::yes, 1, 1}, Problem{96, 1000, 64, Trans::yes, Trans::no, 1, 0}}) {
    std::vector<std::vector<float>> results;
    for (const int count : {1, 2, 3, 7}) {
      set_thread_count(count);
      Run<float> run(p);
      gemm<float>(run.args);
      results.push_back(run.c);
    }
    for (const std::vector<float>& result : results)
      CHECK(std::equal(result.begin(), result.end(), results[0].begin(), [](float a, float b) {
        return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
      }));
  }
  set_thread_count(threads);
}

TEST_CASE("the vector exponential is accurate over its range") {
  double worst = 0;
  for (double x = -87.3; x < 88.0; x += 0.00137) {
    const float argument = static_cast<float>(x);
    const float y = simd::exp<float>(simd::broadcast(argument))[0];
    worst = std::max(worst, std::abs(static_cast<double>(y) / std::exp(static_cast<double>(argument)) - 1));
  }
  CHECK(worst < 2e-7);
  CHECK(simd::exp<float>(simd::broadcast(0.0f))[0] == 1.0f);
  CHECK(simd::exp<float>(simd::broadcast(-200.0f))[0] == 0.0f);
  CHECK(simd::exp<float>(simd::broadcast(-INFINITY))[0] == 0.0f);
  CHECK(std::isnan(simd::exp<float>(simd::broadcast(NAN))[0]));
}

}  // namespace
}  // namespace kiln

#include <cstdlib>
#include <new>
#include <numeric>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"
#include "optim/projector.h"
#include "optim/support.h"

using namespace kiln;

namespace {
std::size_t allocations = 0;  // by operator new, on the thread that runs the tests
}

// Not inlined: GCC would take the pair malloc and delete for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++allocations;
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
// The nothrow form too: a sanitizer would see a free of what it takes for memory of its own operator new.
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using Vector = std::vector<double>;

OptimizerOptions fira(FiraVariant variant) {
  return {.kind = OptimizerKind::fira,
          .eps = 1e-6,
          .weight_decay = 0.1,
          .rank = 4,
          .refresh = 5,
          .projector = ProjectorKind::svd,
          .variant = variant,
          .gamma = 1.1};
}
OptimizerOptions galore() {
  OptimizerOptions options = fira(FiraVariant::paper);
  options.kind = OptimizerKind::galore;
  return options;
}

/// GaLore and Fira as the papers write them, with the residual as a matrix of its own; the basis is given.
struct Naive {
  OptimizerOptions options;
  std::int64_t rows, columns, rank;
  Vector w, m, v;
  double previous = -1;

  bool right() const { return rows >= columns; }
  double at(const Vector& x, std::int64_t i, std::int64_t j, std::int64_t width) const {
    return x[static_cast<std::size_t>(i * width + j)];
  }
  /// [vectors, rank]: component c of vector i of G along basis vector c
  Vector project(const Vector& g, std::span<const double> q) const {
    const std::int64_t vectors = std::max(rows, columns), side = std::min(rows, columns);
    Vector r(static_cast<std::size_t>(vectors * rank), 0.0);
    for (std::int64_t i = 0; i < vectors; ++i)
      for (std::int64_t c = 0; c < rank; ++c)
        for (std::int64_t s = 0; s < side; ++s)
          r[static_cast<std::size_t>(i * rank + c)] +=
              (right() ? at(g, i, s, columns) : at(g, s, i, columns)) * q[static_cast<std::size_t>(s * rank + c)];
    return r;
  }
  Vector back(const Vector& r, std::span<const double> q) const {
    Vector x(w.size(), 0.0);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j)
        for (std::int64_t c = 0; c < rank; ++c)
          x[static_cast<std::size_t>(i * columns + j)] +=
              at(r, right() ? i : j, c, rank) * q[static_cast<std::size_t>((right() ? j : i) * rank + c)];
    return x;
  }
  double row_norm(const Vector& r, std::int64_t i) const {
    double sum = 0;
    for (std::int64_t c = 0; c < rank; ++c) sum += at(r, i, c, rank) * at(r, i, c, rank);
    return std::sqrt(sum);
  }

  Vector residual(const Vector& g, const Vector& r, const Vector& n, std::span<const double> q) {
    const double kept = options.variant == FiraVariant::reference ? options.alpha : 1.0;
    Vector s = back(r, q);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) {
        const std::int64_t vector = right() ? i : j;
        const double phi = row_norm(n, vector) / (row_norm(r, vector) + 1e-8);
        double& x = s[static_cast<std::size_t>(i * columns + j)];
        x = phi * (at(g, i, j, columns) - kept * x);
      }
    auto norm = [&] { return std::sqrt(std::inner_product(s.begin(), s.end(), s.begin(), 0.0)); };
    if (previous >= 0) {
      const double limit = std::max(norm() / (previous + 1e-8), options.gamma) / options.gamma;
      for (double& x : s) x /= limit;
    }
    previous = norm();
    return s;
  }

  void step(std::int64_t t, double lr, const Vector& g, std::span<const double> q) {
    const Vector r = project(g, q);
    m.resize(r.size(), 0.0);
    v.resize(r.size(), 0.0);
    Vector n(r.size());
    for (std::size_t i = 0; i < r.size(); ++i) {
      m[i] = options.beta1 * m[i] + (1 - options.beta1) * r[i];
      v[i] = options.beta2 * v[i] + (1 - options.beta2) * r[i] * r[i];
      n[i] = m[i] / (std::sqrt(v[i]) + options.eps);
    }
    Vector update = back(n, q);
    for (double& x : update) x *= options.alpha;
    if (options.kind == OptimizerKind::fira) {
      const Vector s = residual(g, r, n, q);
      const double scale = options.variant == FiraVariant::reference ? 1.0 : options.alpha;
      for (std::size_t i = 0; i < s.size(); ++i) update[i] += scale * s[i];
    }
    const double steps = static_cast<double>(t);
    const double rate = lr * std::sqrt(1 - std::pow(options.beta2, steps)) / (1 - std::pow(options.beta1, steps));
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = (w[i] - rate * update[i]) * (1 - lr * options.weight_decay);
  }
};

/// Largest relative error of W between the fused f64 kernel and the formula, over 13 steps with a clipped gradient.
double error_against_naive(const OptimizerOptions& options, std::int64_t rows, std::int64_t columns) {
  test::Driver<double> driver(options, test::matrix(rows, columns));
  test::fill_weights(driver.w(), rows, columns);
  Naive naive{.options = options,
              .rows = rows,
              .columns = columns,
              .rank = std::min({options.rank, rows, columns}),
              .w = Vector(driver.w().begin(), driver.w().end()),
              .m = {},
              .v = {}};
  double worst = 0;
  for (std::int64_t t = 1; t <= 13; ++t) {
    test::fill_gradient(driver.g(), rows, columns, t);
    const double clip = t % 3 == 0 ? 0.37 : 1.0;
    Vector g(driver.g().begin(), driver.g().end());
    for (double& x : g) x *= clip;
    driver.step(t, test::learning_rate(t), clip);
    naive.step(t, test::learning_rate(t), g, driver.state("projector").span<double>());
    worst = std::max(worst, test::relative_error(driver.w(), std::span(naive.w)));
  }
  return worst;
}

std::vector<float> trained(const OptimizerOptions& options, std::int64_t rows, std::int64_t columns) {
  test::Driver<float> driver(options, test::matrix(rows, columns));
  test::fill_weights(driver.w(), rows, columns);
  for (std::int64_t t = 1; t <= 7; ++t) {
    test::fill_gradient(driver.g(), rows, columns, t);
    driver.step(t, 0.01, 0.5);
  }
  return {driver.w().begin(), driver.w().end()};
}

}  // namespace

TEST_CASE("the fused Fira and GaLore updates equal the papers' formulas in f64") {
  const auto [rows, columns] = GENERATE(
      table<std::int64_t, std::int64_t>({{37, 23}, {23, 37}, {16, 16}, {130, 5}, {5, 130}, {3, 9}, {9, 3}, {1, 7}}));
  INFO(rows << " x " << columns);
  CHECK(error_against_naive(fira(FiraVariant::paper), rows, columns) < 1e-11);
  CHECK(error_against_naive(fira(FiraVariant::reference), rows, columns) < 1e-11);
  CHECK(error_against_naive(galore(), rows, columns) < 1e-11);
}

TEST_CASE("the limiter keeps the residual's growth at gamma") {
  test::Driver<double> driver(fira(FiraVariant::paper), test::matrix(20, 12));
  double previous = 0;
  for (std::int64_t t = 1; t <= 12; ++t) {
    test::fill_gradient(driver.g(), 20, 12, t);
    driver.step(t, 0.01);
    const double norm = *driver.state("limiter_norm").as<double>();
    CHECK(norm > 0);
    if (t > 1) CHECK(norm <= 1.1 * (previous + 1e-8) * (1 + 1e-12));
    previous = norm;
  }
}

TEST_CASE("updates are bitwise the same for any number of threads") {
  const int threads = thread_count();
  const ProjectorKind projector = GENERATE(ProjectorKind::power, ProjectorKind::svd);
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{257, 190}, {190, 257}}));
  for (OptimizerOptions options : {fira(FiraVariant::paper), fira(FiraVariant::reference), galore()}) {
    options.projector = projector;
    options.rank = 33;
    set_thread_count(1);
    const std::vector<float> one = trained(options, rows, columns);
    for (const int count : {2, 3, 7}) {
      set_thread_count(count);
      INFO(count << " threads, " << rows << " x " << columns);
      CHECK(trained(options, rows, columns) == one);
    }
  }
  set_thread_count(threads);
}

TEST_CASE("the projector is refreshed at steps 1, 1 + T, 1 + 2T") {
  OptimizerOptions options = fira(FiraVariant::paper);
  options.projector = GENERATE(ProjectorKind::power, ProjectorKind::svd);
  test::Driver<float> driver(options, test::matrix(24, 16));
  std::vector<float> last(driver.state("projector").numel(), 0.0f);
  for (std::int64_t t = 1; t <= 16; ++t) {
    test::fill_gradient(driver.g(), 24, 16, t);
    driver.step(t, 0.01);
    const auto q = driver.state("projector").span<float>();
    INFO("step " << t);
    CHECK(std::equal(q.begin(), q.end(), last.begin()) == ((t - 1) % options.refresh != 0));
    last.assign(q.begin(), q.end());
  }
}

TEST_CASE("refreshes are spread over the interval, and each matrix starts cold at step 1") {
  Parameter parameter = test::matrix(24, 16);
  parameter.low_rank_count = 7;
  std::vector<int> refreshes(31, 0);
  for (parameter.low_rank_index = 0; parameter.low_rank_index < 7; ++parameter.low_rank_index) {
    const RefreshSchedule schedule = refresh_schedule(parameter, 10, true);
    CHECK(schedule.offset == parameter.low_rank_index * 10 / 7);
    std::int64_t epoch = -1;
    for (std::int64_t t = 1; t <= 30; ++t) {
      const bool due = refresh_due(schedule, t);
      refreshes[static_cast<std::size_t>(t)] += due;
      epoch += due;
      CHECK(refresh_epoch(schedule, t) == epoch);
    }
  }
  CHECK(refreshes[1] == 7);
  for (std::size_t t = 2; t <= 30; ++t) CHECK(refreshes[t] <= 1);
  CHECK(refresh_schedule(parameter, 10, false).offset == 0);

  // The op keeps to it.
  parameter.low_rank_index = 3;  // offset 2 of 5
  OptimizerOptions options = fira(FiraVariant::paper);
  REQUIRE(options.stagger);
  test::Driver<float> driver(options, parameter);
  std::vector<float> last(driver.state("projector").numel(), 0.0f);
  for (std::int64_t t = 1; t <= 12; ++t) {
    test::fill_gradient(driver.g(), 24, 16, t);
    driver.step(t, 0.01);
    const auto q = driver.state("projector").span<float>();
    CHECK(std::equal(q.begin(), q.end(), last.begin()) == (t != 1 && t != 3 && t != 8));
    last.assign(q.begin(), q.end());
  }
}

TEST_CASE("clip_scale is a factor on the gradient") {
  for (const OptimizerOptions& options : {fira(FiraVariant::reference), galore()}) {
    test::Driver<float> scaled(options, test::matrix(24, 16)), clipped(options, test::matrix(24, 16));
    for (std::int64_t t = 1; t <= 7; ++t) {
      test::fill_gradient(clipped.g(), 24, 16, t);
      for (std::size_t i = 0; i < clipped.g().size(); ++i) scaled.g()[i] = 0.25f * clipped.g()[i];
      scaled.step(t, 0.01);
      clipped.step(t, 0.01, 0.25);
      CHECK(test::relative_error(clipped.w(), scaled.w()) < 1e-5);
    }
  }
}

TEST_CASE("an update touches the parameter's own rows of a fused storage, with the values it has alone") {
  const std::int64_t rows = 24, columns = 16, before = 5;
  Parameter parameter = test::matrix(rows, columns);
  test::Driver<float> alone(fira(FiraVariant::paper), parameter);
  parameter.row_begin = before;
  test::Driver<float> fused(fira(FiraVariant::paper), parameter, {{40, columns}, DType::f32});
  const auto offset = static_cast<std::size_t>(before * columns);
  std::fill(fused.w().begin(), fused.w().end(), 7.0f);
  std::fill(fused.g().begin(), fused.g().end(), 3.0f);
  test::fill_weights(alone.w(), rows, columns);
  std::copy(alone.w().begin(), alone.w().end(), fused.w().begin() + static_cast<std::ptrdiff_t>(offset));
  for (std::int64_t t = 1; t <= 6; ++t) {
    test::fill_gradient(alone.g(), rows, columns, t);
    std::copy(alone.g().begin(), alone.g().end(), fused.g().begin() + static_cast<std::ptrdiff_t>(offset));
    alone.step(t, 0.01);
    fused.step(t, 0.01);
  }
  const std::size_t end = offset + alone.w().size();
  for (std::size_t i = 0; i < fused.w().size(); ++i)
    CHECK(fused.w()[i] == (i >= offset && i < end ? alone.w()[i - offset] : 7.0f));
}

TEST_CASE("no step after the first allocates, with a refresh or without") {
  for (const OptimizerKind kind : optimizer_kinds())
    for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8}) {
      if (kind == OptimizerKind::adam8bit && states != StatePrecision::int8) continue;
      OptimizerOptions options = fira(FiraVariant::paper);
      options.kind = kind;
      options.refresh = 2;
      options.projector = ProjectorKind::power;
      options.states = options.projector_states = states;
      test::Driver<float> driver(options, test::matrix(96, 64));
      test::fill_gradient(driver.g(), 96, 64, 1);
      driver.step(1, 0.01);
      INFO(to_string(kind) << " " << to_string(states));
      const std::size_t before = allocations;
      for (std::int64_t t = 2; t <= 5; ++t) driver.step(t, 0.01);
      CHECK(allocations == before);
    }
}

TEST_CASE("zero and non-finite gradients") {
  OptimizerOptions options = fira(FiraVariant::paper);
  options.projector = GENERATE(ProjectorKind::power, ProjectorKind::svd);
  SECTION("a zero gradient leaves the weights, and the next one is taken up") {
    options.weight_decay = 0;
    test::Driver<float> driver(options, test::matrix(24, 16));
    test::fill_weights(driver.w(), 24, 16);
    const std::vector<float> before(driver.w().begin(), driver.w().end());
    driver.step(1, 0.01);
    CHECK(std::equal(before.begin(), before.end(), driver.w().begin()));
    test::fill_gradient(driver.g(), 24, 16, 2);
    driver.step(2, 0.01);
    for (const float w : driver.w()) CHECK(std::isfinite(w));
    CHECK_FALSE(std::equal(before.begin(), before.end(), driver.w().begin()));
  }
  SECTION("a refresh on a gradient that is not finite keeps the old basis") {
    const float bad = GENERATE(std::nanf(""), INFINITY);
    test::Driver<float> driver(options, test::matrix(24, 16));
    test::fill_gradient(driver.g(), 24, 16, 1);
    driver.step(1, 0.01);
    const auto q = driver.state("projector").span<float>();
    const std::vector<float> before(q.begin(), q.end());
    driver.g()[17] = bad;
    driver.step(1 + options.refresh, 0.01);
    CHECK(std::equal(before.begin(), before.end(), q.begin()));
  }
}

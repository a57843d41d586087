// What every member of the family holds to, in every precision of its states.
#include <limits>

#include "catch.h"
#include "core/parallel.h"
#include "optim/apollo.h"
#include "optim/lora.h"
#include "optim/muon.h"
#include "optim/orthonormal.h"
#include "optim/support.h"

using namespace kiln;

namespace {

/// Each kind with each precision that it can have; small rank, refreshes every 5 steps.
std::vector<OptimizerOptions> all_members() {
  std::vector<OptimizerOptions> list;
  for (const OptimizerKind kind : optimizer_kinds())
    for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8}) {
      if (kind == OptimizerKind::adam8bit && states != StatePrecision::int8) continue;
      const OptimizerDefaults defaults = optimizer_defaults(kind);
      list.push_back({.kind = kind,
                      .eps = defaults.eps,
                      .weight_decay = 0.1,
                      .rank = 6,
                      .alpha = defaults.alpha,
                      .refresh = 5,
                      .gamma = 1.1,
                      .states = states,
                      .projector_states = states,
                      .rewarm = 3});
    }
  return list;
}

std::string name_of(const OptimizerOptions& options) {
  return fmt::format("{} {}", to_string(options.kind), to_string(options.states));
}

std::vector<float> trained(const OptimizerOptions& options, std::int64_t rows, std::int64_t columns,
                           std::int64_t steps) {
  test::Driver<float> driver(options, test::matrix(rows, columns));
  test::fill_weights(driver.w(), rows, columns);
  for (std::int64_t t = 1; t <= steps; ++t) {
    test::fill_gradient(driver.g(), rows, columns, t);
    driver.step(t, 0.01, 0.5);
  }
  return {driver.w().begin(), driver.w().end()};
}

/// Bytes as the definitions count them, of sides m <= n.
std::size_t expected_bytes(const OptimizerOptions& o, std::size_t m, std::size_t n, std::size_t r) {
  auto stored = [](std::size_t elements, StatePrecision precision) {
    if (precision == StatePrecision::int8) return elements + 4 * ((elements + 255) / 256);
    return elements * (precision == StatePrecision::fp32 ? 4u : 2u);
  };
  const std::size_t basis = stored(m * r, o.projector_states), moments = 2 * stored(n * r, o.states);
  switch (o.kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::adam8bit:
      return 2 * stored(m * n, o.states);
    case OptimizerKind::galore:
      return basis + moments;
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
      return basis + moments + 4;
    case OptimizerKind::apollo:
      return moments + 4;
    case OptimizerKind::apollo_mini:
      return 2 * stored(n, o.states) + 4;
    case OptimizerKind::muon:
      return stored(m * n, o.states);
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return 4 * (m + n) * r + 2 * stored(m * r, o.states) + moments;
  }
  return 0;
}

}  // namespace

TEST_CASE("state bytes of every member and precision are the formula's, to the byte") {
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{40, 24}, {24, 40}, {301, 5}, {257, 190}}));
  const auto m = static_cast<std::size_t>(std::min(rows, columns)),
             n = static_cast<std::size_t>(std::max(rows, columns));
  for (const OptimizerOptions& options : all_members()) {
    INFO(name_of(options) << " " << rows << " x " << columns);
    const Parameter linear = test::matrix(rows, columns);
    CHECK(make_optimizer(options)->state_bytes(linear) == expected_bytes(options, m, n, std::min<std::size_t>(6, m)));
  }
}

TEST_CASE("every member is bitwise the same for any number of threads") {
  const int threads = thread_count();
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{190, 131}, {131, 190}}));
  std::vector<std::vector<float>> gradients(3, std::vector<float>(static_cast<std::size_t>(rows * columns)));
  for (std::size_t t = 0; t < 3; ++t)
    test::fill_gradient(std::span(gradients[t]), rows, columns, static_cast<std::int64_t>(t));
  auto run = [&, m = rows, n = columns](const OptimizerOptions& options, int count) {
    set_thread_count(count);
    test::Driver<float> driver(options, test::matrix(m, n));
    for (std::size_t t = 0; t < 3; ++t) {
      std::copy(gradients[t].begin(), gradients[t].end(), driver.g().begin());
      driver.step(static_cast<std::int64_t>(t) + 1, 0.01, 0.5);
    }
    return std::vector<float>(driver.w().begin(), driver.w().end());
  };
  for (OptimizerOptions options : all_members()) {
    options.rank = 77;
    options.refresh = 2;
    const std::vector<float> one = run(options, 1);
    for (const int count : {2, 5}) {
      INFO(name_of(options) << ", " << count << " threads");
      CHECK(run(options, count) == one);
    }
  }
  set_thread_count(threads);
}

TEST_CASE("rounded states change the path, but not much") {
  for (const OptimizerOptions& options : all_members()) {
    if (options.states == StatePrecision::fp32) continue;
    OptimizerOptions exact = options;
    exact.states = exact.projector_states = StatePrecision::fp32;
    if (exact.kind == OptimizerKind::adam8bit) exact.kind = OptimizerKind::adamw;
    const std::vector<float> a = trained(options, 48, 32, 12), b = trained(exact, 48, 32, 12);
    std::vector<float> start(a.size());
    test::fill_weights(std::span(start), 48, 32);
    std::vector<float> path_a(a.size()), path_b(a.size());
    for (std::size_t i = 0; i < a.size(); ++i) path_a[i] = a[i] - start[i], path_b[i] = b[i] - start[i];
    INFO(name_of(options));
    const double error = test::relative_error(std::span(path_a), std::span(path_b));
    CHECK(error > 0);
    // Muon raises every direction of the momentum to one size, those that rounding made included.
    const double many = options.kind == OptimizerKind::muon ? 5 : 1;
    CHECK(error < many * (options.states == StatePrecision::int8 ? 0.2 : 0.05));
  }
}

TEST_CASE("Muon's scale is that of the matrix without a device's padding") {
  Parameter parameter = test::matrix(64, 96);
  parameter.own = {64, 90};
  for (const MuonScale scale : {MuonScale::match_rms, MuonScale::spectral}) {
    const MuonUpdate::Options options{.momentum = 0.9, .weight_decay = 0, .scale = scale, .seed = 1};
    CHECK(MuonUpdate(parameter, options).scale() == MuonUpdate(test::matrix(64, 90), options).scale());
  }
  CHECK(MuonUpdate(test::matrix(64, 90), {.momentum = 0.9, .weight_decay = 0, .scale = MuonScale::match_rms, .seed = 1})
            .scale() == 0.2 * std::sqrt(90.0));
}

TEST_CASE("clip_scale is a factor on the gradient of every member") {
  for (const OptimizerOptions& options : all_members()) {
    if (options.states != StatePrecision::fp32) continue;
    test::Driver<float> scaled(options, test::matrix(24, 16)), clipped(options, test::matrix(24, 16));
    for (std::int64_t t = 1; t <= 7; ++t) {
      test::fill_gradient(clipped.g(), 24, 16, t);
      for (std::size_t i = 0; i < clipped.g().size(); ++i) scaled.g()[i] = 0.25f * clipped.g()[i];
      scaled.step(t, 0.01);
      clipped.step(t, 0.01, 0.25);
    }
    INFO(name_of(options));
    CHECK(test::relative_error(clipped.w(), scaled.w()) < 1e-5);
  }
}

TEST_CASE("every member stays within the parameter's rows of a fused storage, and leaves the gradient's other rows") {
  const std::int64_t rows = 24, columns = 16, before = 5;
  for (const OptimizerOptions& options : all_members()) {
    Parameter parameter = test::matrix(rows, columns);
    test::Driver<float> alone(options, parameter);
    parameter.row_begin = before;
    test::Driver<float> fused(options, parameter, {{40, columns}, DType::f32});
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
    INFO(name_of(options));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < fused.w().size(); ++i) {
      const bool own = i >= offset && i < offset + alone.w().size();
      wrong += fused.w()[i] != (own ? alone.w()[i - offset] : 7.0f) || (!own && fused.g()[i] != 3.0f);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("a zero gradient from the start moves no weight, and the next one is taken up") {
  for (OptimizerOptions options : all_members()) {
    options.weight_decay = 0;
    test::Driver<float> driver(options, test::matrix(24, 16));
    test::fill_weights(driver.w(), 24, 16);
    const std::vector<float> before(driver.w().begin(), driver.w().end());
    driver.step(1, 0.01);
    INFO(name_of(options));
    CHECK(std::equal(before.begin(), before.end(), driver.w().begin()));
    for (std::int64_t t = 2; t <= 3; ++t) {
      test::fill_gradient(driver.g(), 24, 16, t);
      driver.step(t, 0.01);
    }
    for (const float w : driver.w()) REQUIRE(std::isfinite(w));
    CHECK_FALSE(std::equal(before.begin(), before.end(), driver.w().begin()));
  }
}

TEST_CASE("int8 second moments of rare gradients do not blow a step up") {
  // One element has gradients 10^4 times those of its block: without care the others' second moments round to zero,
  // while their first moments do not.
  OptimizerOptions options{.kind = OptimizerKind::adam8bit, .states = StatePrecision::int8};
  test::Driver<float> driver(options, test::matrix(16, 16));
  for (std::int64_t t = 1; t <= 60; ++t) {
    for (std::size_t i = 0; i < 256; ++i) driver.g()[i] = t <= 20 ? (i == 0 ? 1.0f : 1e-4f) : 0.0f;
    driver.step(t, 0.01);
  }
  for (const float w : driver.w()) CHECK(std::abs(w) < 1.0f);  // 60 steps of about 0.01
}

TEST_CASE("Fira+ turns its moments with the basis") {
  OptimizerOptions options{.kind = OptimizerKind::fira_plus,
                           .eps = 1e-6,
                           .rank = 4,
                           .refresh = 5,
                           .projector = GENERATE(ProjectorKind::power, ProjectorKind::svd)};
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{24, 16}, {16, 24}}));
  SECTION("with a gradient that stays, the basis does and the step is Fira's") {
    options.projector = ProjectorKind::svd;
    OptimizerOptions fira = options;
    fira.kind = OptimizerKind::fira;
    test::Driver<double> a(options, test::matrix(rows, columns)), b(fira, test::matrix(rows, columns));
    for (std::int64_t t = 1; t <= 12; ++t) {
      test::fill_gradient(a.g(), rows, columns, 3);
      test::fill_gradient(b.g(), rows, columns, 3);
      a.step(t, 0.01);
      b.step(t, 0.01);
    }
    CHECK(test::relative_error(a.w(), b.w()) < 1e-9);
  }
  SECTION("the first moment is the old one's projection on the new basis; the second is never negative") {
    test::Driver<double> driver(options, test::matrix(rows, columns));
    auto momentum = [&] {  // m Q', [vectors, short]
      const auto m = driver.state("exp_avg").span<double>(), q = driver.state("projector").span<double>();
      const std::size_t vectors = m.size() / 4, side = q.size() / 4;
      std::vector<double> x(vectors * side, 0.0);
      for (std::size_t i = 0; i < vectors; ++i)
        for (std::size_t s = 0; s < side; ++s)
          for (std::size_t c = 0; c < 4; ++c) x[i * side + s] += m[i * 4 + c] * q[s * 4 + c];
      return x;
    };
    for (std::int64_t t = 1; t <= 5; ++t) {
      test::fill_gradient(driver.g(), rows, columns, t);
      driver.step(t, 0.0);
    }
    const std::vector<double> before = momentum();
    test::fill_gradient(driver.g(), rows, columns, 6);
    driver.step(6, 0.0, 0.0);  // a refresh, with a gradient of factor 0 in the moments
    const auto q = driver.state("projector").span<double>();
    const std::size_t side = q.size() / 4, vectors = before.size() / side;
    std::vector<double> expected(before.size(), 0.0);  // b1 X Q Q'
    for (std::size_t i = 0; i < vectors; ++i)
      for (std::size_t c = 0; c < 4; ++c) {
        double along = 0;
        for (std::size_t k = 0; k < side; ++k) along += before[i * side + k] * q[k * 4 + c];
        for (std::size_t k = 0; k < side; ++k) expected[i * side + k] += options.beta1 * along * q[k * 4 + c];
      }
    const std::vector<double> after = momentum();
    CHECK(test::relative_error(std::span(after), std::span(expected)) < 1e-12);
    CHECK(test::relative_error(std::span(after), std::span(before)) < 0.6);
    for (std::int64_t t = 7; t <= 40; ++t) {
      test::fill_gradient(driver.g(), rows, columns, t);
      driver.step(t, 0.01);
      for (const double v : driver.state("exp_avg_sq").span<double>()) REQUIRE(v >= 0);
    }
  }
  SECTION("Adam's states of embedding and head are int8, those of norms fp32") {
    Parameter embedding = test::matrix(rows, columns);
    embedding.low_rank = false;
    CHECK(make_optimizer(options)->states(embedding)[0].spec.dtype == DType::u8);
    CHECK(make_optimizer(options)->states({.name = "norm", .shape = {16}})[0].spec.dtype == DType::f32);
  }
}

TEST_CASE("an APOLLO step is the gradient with one factor a row or column, or one in all") {
  for (const OptimizerKind kind : {OptimizerKind::apollo, OptimizerKind::apollo_mini}) {
    const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{24, 16}, {16, 24}}));
    test::Driver<double> driver({.kind = kind, .rank = 4, .alpha = 2, .refresh = 3}, test::matrix(rows, columns));
    double previous = 0;
    for (std::int64_t t = 1; t <= 8; ++t) {
      std::fill(driver.w().begin(), driver.w().end(), 0.0);
      test::fill_gradient(driver.g(), rows, columns, t);
      driver.step(t, 0.01);
      std::vector<double> factor(static_cast<std::size_t>(std::max(rows, columns)), 0.0);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < columns; ++j) {
          const auto e = static_cast<std::size_t>(i * columns + j);
          const double ratio = -driver.w()[e] / driver.g()[e];
          double& known =
              factor[kind == OptimizerKind::apollo_mini ? 0 : static_cast<std::size_t>(rows > columns ? i : j)];
          if (known == 0) known = ratio;
          CHECK(ratio == Approx(known).epsilon(1e-9));
          CHECK(ratio > 0);
        }
      if (kind == OptimizerKind::apollo) CHECK(factor[0] != Approx(factor[1]).epsilon(1e-3));
      const double norm = *driver.state("limiter_norm").as<double>();
      if (t > 1) CHECK(norm <= 1.01 * (previous + 1e-8) * (1 + 1e-12));
      previous = norm;
    }
  }
}

TEST_CASE("Muon's step has the momentum's singular vectors and singular values near one") {
  const std::int64_t m = 12, n = GENERATE(12, 31);
  const auto size = static_cast<std::size_t>(n);
  std::vector<double> u(12 * 12), v(size * 12), workspace(static_cast<std::size_t>(orthonormal_workspace(12)));
  test::fill_gradient(std::span(u), m, m, 1);
  test::fill_gradient(std::span(v), n, m, 2);
  orthonormalise(m, m, u.data(), workspace.data());
  orthonormalise(n, m, v.data(), workspace.data());
  std::vector<double> x(12 * size, 0.0), copy(x.size()), grams(2 * 12 * 12);
  for (std::size_t i = 0; i < 12; ++i)
    for (std::size_t j = 0; j < size; ++j)
      for (std::size_t k = 0; k < 12; ++k)
        x[i * size + j] += 5 * std::pow(0.7, static_cast<double>(k)) * u[i * 12 + k] * v[j * 12 + k];
  orthogonalise(m, n, x.data(), copy.data(), grams.data());
  for (std::size_t a = 0; a < 12; ++a)
    for (std::size_t b = 0; b < 12; ++b) {
      double along = 0;
      for (std::size_t i = 0; i < 12; ++i)
        for (std::size_t j = 0; j < size; ++j) along += u[i * 12 + a] * x[i * size + j] * v[j * 12 + b];
      if (a == b)
        CHECK((along > 0.6 && along < 1.25));
      else
        CHECK(std::abs(along) < 1e-10);
    }

  Parameter wide = test::matrix(m, n);
  const MuonUpdate::Options rms{.momentum = 0.95, .weight_decay = 0, .scale = MuonScale::match_rms, .seed = 1};
  MuonUpdate::Options spectral = rms;
  spectral.scale = MuonScale::spectral;
  CHECK(MuonUpdate(wide, rms).scale() == Approx(0.2 * std::sqrt(static_cast<double>(n))));
  CHECK(MuonUpdate(wide, spectral).scale() == 1.0);
  CHECK(MuonUpdate(test::matrix(40, 10), spectral).scale() == Approx(2.0));
}

TEST_CASE("LoRA keeps W - s B A, ReLoRA between restarts, where W stays") {
  const bool restart = GENERATE(false, true);
  const std::int64_t rows = 20, columns = 14, r = 3;
  const OptimizerOptions options{
      .kind = restart ? OptimizerKind::relora : OptimizerKind::lora, .rank = r, .alpha = 6, .refresh = 6, .rewarm = 3};
  test::Driver<double> driver(options, test::matrix(rows, columns));
  test::fill_weights(driver.w(), rows, columns);
  auto base = [&] {  // W - s B A
    std::vector<double> x(driver.w().begin(), driver.w().end());
    const auto a = driver.state("lora_a").span<double>(), b = driver.state("lora_b").span<double>();
    for (std::size_t i = 0; i < 20; ++i)
      for (std::size_t j = 0; j < 14; ++j)
        for (std::size_t k = 0; k < 3; ++k) x[i * 14 + j] -= 2.0 * b[i * 3 + k] * a[k * 14 + j];
    return x;
  };
  std::vector<double> fixed(driver.w().begin(), driver.w().end());
  for (std::int64_t t = 1; t <= 14; ++t) {
    const std::vector<double> before(driver.w().begin(), driver.w().end());
    test::fill_gradient(driver.g(), rows, columns, t);
    driver.step(t, 0.01);
    if (restart && (t == 7 || t == 13)) {
      CHECK(test::relative_error(std::span(fixed), std::span(before)) > 1e-3);
      fixed = before;
      std::size_t nonzero = 0;  // of the old first moments one number is left, and the new gradient of B
      for (const double m : driver.state("lora_a_exp_avg").span<double>()) nonzero += m != 0;
      CHECK(nonzero == 1);
    }
    INFO("step " << t);
    const std::vector<double> now = base();
    CHECK(test::relative_error(std::span(now), std::span(fixed)) < 1e-13);
  }

  const LoraUpdate::Options o{.beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .weight_decay = 0,
                              .rank = r,
                              .alpha = 6,
                              .restart = restart,
                              .refresh = 6,
                              .stagger = false,
                              .rewarm = 3,
                              .seed = 1};
  const LoraUpdate op(test::matrix(rows, columns), o);
  const double third = restart ? 1.0 / 3 : 1.0;
  CHECK(op.rewarmed(1) == 1.0);
  CHECK(op.rewarmed(6) == 1.0);
  CHECK(op.rewarmed(7) == Approx(third));
  CHECK(op.rewarmed(9) == 1.0);
  CHECK(op.rewarmed(13) == Approx(third));
}

TEST_CASE("options of the newer members out of range name their key") {
  auto refuses = [](OptimizerOptions options, const std::string& words) {
    CHECK_THROWS_WITH(make_optimizer(options), ContainsSubstring(words));
  };
  refuses({.kind = OptimizerKind::muon, .momentum = 1}, "optimizer.momentum: 1, expected at least 0 and less than 1");
  refuses({.kind = OptimizerKind::relora, .rewarm = -1}, "optimizer.rewarm: -1, expected at least 0");
  refuses({.kind = OptimizerKind::apollo, .rank = 0}, "optimizer.rank: 0");
  refuses({.kind = OptimizerKind::adam8bit}, "adam8bit has int8 states");
  for (const OptimizerKind kind : {OptimizerKind::apollo, OptimizerKind::muon, OptimizerKind::lora}) {
    Parameter vector = test::matrix(24, 16);
    vector.shape = {24};
    CHECK_THROWS_WITH(make_optimizer({.kind = kind})->update_op(vector), ContainsSubstring("needs a matrix"));
  }
}

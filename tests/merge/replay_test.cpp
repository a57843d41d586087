// What a merge claims to be: the decay of the updates that were recorded, or of gradient descent on a quadratic.
#include <array>
#include <cmath>

#include "base/rng.h"
#include "catch.h"
#include "merge/weights.h"

using namespace kiln;

namespace {

constexpr std::size_t kSize = 4, kUpdates = 12;
constexpr double kLr = 0.05;
using Vector = std::array<double, kSize>;

/// sum_k c_k x_k
Vector average(const std::vector<double>& weights, const std::vector<Vector>& checkpoints) {
  REQUIRE(weights.size() == checkpoints.size());
  Vector sum{};
  for (std::size_t k = 0; k < weights.size(); ++k)
    for (std::size_t i = 0; i < kSize; ++i) sum[i] += weights[k] * checkpoints[k][i];
  return sum;
}

double distance(const Vector& a, const Vector& b) {
  double most = 0;
  for (std::size_t i = 0; i < kSize; ++i) most = std::max(most, std::abs(a[i] - b[i]));
  return most;
}

/// Gradient of 0.5 (x - 1)' H (x - 1), H symmetric, positive and not diagonal.
Vector gradient(const Vector& x) {
  Vector g{};
  for (std::size_t i = 0; i < kSize; ++i)
    for (std::size_t j = 0; j < kSize; ++j)
      g[i] += (i == j ? 2.0 + static_cast<double>(i) : 0.7 / static_cast<double>(1 + i + j)) * (x[j] - 1.0);
  return g;
}

/// The gradient of one minibatch: the quadratic's, with noise that depends on the step alone.
Vector noisy_gradient(const Vector& x, std::size_t step) {
  const Philox random(5, step);
  Vector g = gradient(x);
  for (std::size_t i = 0; i < kSize; ++i) g[i] += 0.3 * random.normal(i);
  return g;
}

const Vector kStart{3.0, -2.0, 0.5, 4.0};

/// Adam as Kingma & Ba write it, its directions recorded.
class Adam {
 public:
  Vector direction(const Vector& g) {
    ++step_;
    Vector d{};
    for (std::size_t i = 0; i < kSize; ++i) {
      m_[i] = 0.9 * m_[i] + 0.1 * g[i];
      v_[i] = 0.999 * v_[i] + 0.001 * g[i] * g[i];
      d[i] = m_[i] / (1 - std::pow(0.9, step_)) / (std::sqrt(v_[i] / (1 - std::pow(0.999, step_))) + 1e-8);
    }
    return d;
  }

 private:
  Vector m_{}, v_{};
  double step_ = 0;
};

/// A constant-rate run: its checkpoints, oldest first, and the directions of its updates.
struct Run {
  std::vector<Vector> checkpoints{kStart}, directions;
  void update(const Vector& direction) {
    directions.push_back(direction);
    checkpoints.push_back(stepped(checkpoints.back(), direction, kLr));
  }
  static Vector stepped(Vector x, const Vector& direction, double lr) {
    for (std::size_t i = 0; i < kSize; ++i) x[i] -= lr * direction[i];
    return x;
  }
};

/// The same directions at decayed rates.
Vector replay(const Run& run, const std::vector<double>& decay) {
  Vector x = kStart;
  for (std::size_t j = 0; j < decay.size(); ++j) x = Run::stepped(x, run.directions[j], kLr * decay[j]);
  return x;
}

void check_replays(const Run& run) {
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::one_minus_sqrt})
    for (const double final_ratio : {0.0, 0.1}) {
      const std::vector<double> decay = decay_factors(shape, kUpdates, final_ratio);
      CHECK(distance(average(weights_of_decay(decay), run.checkpoints), replay(run, decay)) < 1e-12);
    }
  // Any average is a decay: the table that `kiln merge` prints must replay it as well.
  for (const MergeMethod method : {MergeMethod::sma, MergeMethod::wma, MergeMethod::ema, MergeMethod::ema_closed,
                                   MergeMethod::schedule, MergeMethod::qam}) {
    const std::vector<double> weights = merge_weights({.method = method}, kUpdates + 1);
    CHECK(distance(average(weights, run.checkpoints), replay(run, decay_of_weights(weights))) < 1e-12);
  }
}

}  // namespace

TEST_CASE("a merge of SGD's checkpoints is its recorded updates at decayed rates") {
  Run run;
  for (std::size_t j = 0; j < kUpdates; ++j) run.update(noisy_gradient(run.checkpoints.back(), j));
  check_replays(run);
}

TEST_CASE("a merge of Adam's checkpoints is its frozen updates at decayed rates") {
  Run run;
  Adam adam;
  for (std::size_t j = 0; j < kUpdates; ++j) run.update(adam.direction(noisy_gradient(run.checkpoints.back(), j)));
  check_replays(run);
}

TEST_CASE("qam is gradient descent on a quadratic at decayed rates, and a plain replay is not") {
  Run run;
  for (std::size_t j = 0; j < kUpdates; ++j) run.update(gradient(run.checkpoints.back()));
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::one_minus_sqrt}) {
    const std::vector<double> decay = decay_factors(shape, kUpdates, 0.05);
    Vector annealed = kStart;
    for (const double factor : decay) annealed = Run::stepped(annealed, gradient(annealed), kLr * factor);
    CHECK(distance(average(qam_weights(decay), run.checkpoints), annealed) < 1e-12);
    CHECK(distance(average(weights_of_decay(decay), run.checkpoints), annealed) > 1e-2);
  }
}

TEST_CASE("qam weights of small decays, by hand") {
  const std::vector<double> one = qam_weights(std::vector<double>{0.25});
  CHECK(one[0] == Approx(0.75));
  CHECK(one[1] == Approx(0.25));
  // (1/2 + t/2)(3/4 + t/4) = 3/8 + 1/2 t + 1/8 t^2
  const std::vector<double> two = qam_weights(std::vector<double>{0.5, 0.25});
  REQUIRE(two.size() == 3);
  CHECK(two[0] == Approx(0.375));
  CHECK(two[1] == Approx(0.5));
  CHECK(two[2] == Approx(0.125));
  CHECK(qam_weights(std::vector<double>{}) == std::vector<double>{1.0});
  CHECK_THROWS_AS(qam_weights(std::vector<double>{0.5, 0.6}), std::exception);
}

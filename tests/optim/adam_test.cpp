#include "catch.h"
#include "core/parallel.h"
#include "optim/support.h"

using namespace kiln;

namespace {

OptimizerOptions adamw() { return {.kind = OptimizerKind::adamw, .eps = 1e-3, .weight_decay = 0.1}; }

Parameter vector(std::int64_t size, bool decay) {
  return {.name = "norm.weight", .shape = {size}, .decay = decay, .low_rank = false};
}

/// w after 12 steps of one element with gradient `gradient(t)`, by torch.optim.AdamW's formula (or GaLore's).
template <typename G>
double by_hand(const OptimizerOptions& o, double w, bool decay, bool pytorch, G gradient) {
  double m = 0, v = 0;
  for (int t = 1; t <= 12; ++t) {
    const double g = gradient(t), lr = test::learning_rate(t), keep = 1 - (decay ? lr * o.weight_decay : 0.0);
    const double c1 = 1 - std::pow(o.beta1, t), c2 = 1 - std::pow(o.beta2, t);
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    if (pytorch)
      w = w * keep - lr / c1 * m / (std::sqrt(v) / std::sqrt(c2) + o.eps);
    else
      w = (w - lr * std::sqrt(c2) / c1 * m / (std::sqrt(v) + o.eps)) * keep;
  }
  return w;
}

}  // namespace

TEST_CASE("Adam in PyTorch's form for AdamW, in GaLore's for what the low-rank optimizers do not project") {
  const bool pytorch = GENERATE(true, false), decay = GENERATE(true, false);
  OptimizerOptions options = adamw();
  if (!pytorch) options.kind = GENERATE(OptimizerKind::galore, OptimizerKind::fira);
  const std::int64_t size = 21;
  test::Driver<double> driver(options, vector(size, decay));
  std::fill(driver.w().begin(), driver.w().end(), 0.5);
  auto gradient = [](int t, std::size_t i) { return 0.02 * std::sin(0.9 * t + static_cast<double>(i)); };
  for (int t = 1; t <= 12; ++t) {
    for (std::size_t i = 0; i < driver.g().size(); ++i) driver.g()[i] = 2 * gradient(t, i);
    driver.step(t, test::learning_rate(t), 0.5);
  }
  for (std::size_t i = 0; i < driver.w().size(); ++i)
    CHECK(driver.w()[i] ==
          Approx(by_hand(options, 0.5, decay, pytorch, [&](int t) { return gradient(t, i); })).epsilon(1e-13));
}

TEST_CASE("AdamW is bitwise the same for any number of threads") {
  const int threads = thread_count();
  auto trained = [](int count) {
    set_thread_count(count);
    test::Driver<float> driver(adamw(), test::matrix(301, 257));
    test::fill_weights(driver.w(), 301, 257);
    test::fill_gradient(driver.g(), 301, 257, 1);
    for (std::int64_t t = 1; t <= 3; ++t) driver.step(t, 0.01);
    return std::vector<float>(driver.w().begin(), driver.w().end());
  };
  const std::vector<float> one = trained(1);
  for (const int count : {2, 3, 5}) CHECK(trained(count) == one);
  set_thread_count(threads);
}

#include "merge/loss_law.h"

#include <cmath>

#include "base/error.h"
#include "base/rng.h"
#include "catch.h"
#include "merge/nelder_mead.h"

using namespace kiln;

namespace {

constexpr double kPeak = 2e-3;

/// Warm-up of 20 steps, the peak, and from `decay_from` on a line to a tenth of it at `total`.
std::vector<double> rates(std::size_t total, std::size_t decay_from) {
  std::vector<double> lr;
  for (std::size_t step = 1; step <= total; ++step) {
    double rate = kPeak * std::min(1.0, static_cast<double>(step) / 20.0);
    if (step > decay_from)
      rate = kPeak * (1 - 0.9 * static_cast<double>(step - decay_from) / static_cast<double>(total - decay_from));
    lr.push_back(rate);
  }
  return lr;
}

/// A curve of the law itself, with noise on each loss, from step `from` on.
LossCurve curve_of(const LossLawFit& truth, std::size_t total, std::size_t decay_from, std::size_t from,
                   std::uint64_t stream, double noise = 0.0) {
  LossCurve curve{.lr = rates(total, decay_from), .step = {}, .loss = {}};
  const Philox random(4, stream);
  for (std::size_t step = from; step <= total; ++step) {
    const double loss = predict_loss(truth, std::span(curve.lr).first(step));
    curve.step.push_back(static_cast<std::int64_t>(step));
    curve.loss.push_back(loss * (1 + noise * random.normal(step)));
  }
  return curve;
}

LossLawFit truth_of(LossLaw law) {
  LossLawFit truth{.law = law, .knows_decay = true, .peak_lr = kPeak, .l0 = 2.8, .a = 4.0, .alpha = 0.5};
  if (law == LossLaw::mtl) {
    truth.decay_scale = 0.005;
    truth.decay = {0.98, 0, 0};
  } else {
    truth.decay_scale = 0.3;
    truth.decay = {0.1, 0.6, 0.4};
  }
  return truth;
}

}  // namespace

TEST_CASE("the laws by hand") {
  // Two steps at the peak, one at half of it: S1 = 2.5, S2 = 0.5; MPL's one drop of 0.5 has S_k = 0.5.
  const std::vector<double> lr{kPeak, kPeak, kPeak / 2};
  const LossLawFit mtl{
      .law = LossLaw::mtl, .peak_lr = kPeak, .l0 = 2, .a = 1, .decay_scale = 0.1, .alpha = 1, .decay = {0.9, 0, 0}};
  CHECK(predict_loss(mtl, lr) == Approx(2 + 1 / 2.5 - 0.1 * 0.5));
  const LossLawFit mpl{
      .law = LossLaw::mpl, .peak_lr = kPeak, .l0 = 2, .a = 1, .decay_scale = 0.1, .alpha = 1, .decay = {3, 1, 1}};
  CHECK(predict_loss(mpl, lr) == Approx(2 + 1 / 2.5 - 0.1 * 0.5 * (1 - 1 / (1 + 3 / 0.5 * 0.5))));
  // A second step at half the peak: m = 0.9 * 0.5 is added to S2.
  CHECK(predict_loss(mtl, std::vector<double>{kPeak, kPeak, kPeak / 2, kPeak / 2}) ==
        Approx(2 + 1 / 3.0 - 0.1 * (0.5 + 0.45)));
}

TEST_CASE("a law fitted to a trunk and an earlier anneal predicts a later one") {
  for (const LossLaw law : {LossLaw::mtl, LossLaw::mpl}) {
    INFO(to_string(law));
    const LossLawFit truth = truth_of(law);
    const std::vector<LossCurve> curves{curve_of(truth, 1000, 1000, 1, 1, 0.005),
                                        curve_of(truth, 500, 400, 401, 2, 0.005)};
    const LossLawFit fit = fit_loss_law(law, curves);
    CHECK(fit.knows_decay);
    CHECK(fit.rms_log_error < 0.004);
    const double gap = predict_loss(truth, rates(1000, 1000)) - predict_loss(truth, rates(1000, 900));
    const double found = predict_loss(fit, rates(1000, 1000)) - predict_loss(fit, rates(1000, 900));
    CHECK(gap > 0.03);
    CHECK(found == Approx(gap).margin(0.15 * gap));
    CHECK(predict_loss(fit, rates(1000, 1000)) == Approx(predict_loss(truth, rates(1000, 1000))).margin(0.005));
  }
}

TEST_CASE("a few wild losses do not move a fit") {
  const LossLawFit truth = truth_of(LossLaw::mtl);
  LossCurve curve = curve_of(truth, 400, 400, 1, 1);
  const double clean = predict_loss(fit_loss_law(LossLaw::mtl, std::span(&curve, 1)), curve.lr);
  for (const std::size_t spike : {90u, 200u, 301u}) curve.loss[spike] *= 2;
  CHECK(predict_loss(fit_loss_law(LossLaw::mtl, std::span(&curve, 1)), curve.lr) == Approx(clean).margin(0.003));
}

TEST_CASE("a constant rate says nothing about a decay, and the fit knows it") {
  const LossCurve curve = curve_of(truth_of(LossLaw::mpl), 500, 500, 1, 1, 0.002);
  for (const LossLaw law : {LossLaw::mtl, LossLaw::mpl}) {
    const LossLawFit fit = fit_loss_law(law, std::span(&curve, 1));
    CHECK_FALSE(fit.knows_decay);
    CHECK(predict_loss(fit, curve.lr) == Approx(curve.loss.back()).margin(0.02));
  }
}

TEST_CASE("curves that cannot be fitted are refused") {
  CHECK_THROWS_AS(fit_loss_law(LossLaw::mtl, std::span<const LossCurve>{}), Error);
  const LossCurve brief = curve_of(truth_of(LossLaw::mtl), 25, 25, 1, 1);
  CHECK_THROWS_WITH(fit_loss_law(LossLaw::mtl, std::span(&brief, 1)), ContainsSubstring("too few for a loss law"));
}

TEST_CASE("the simplex search finds the bottom of a bent valley") {
  const auto rosenbrock = [](const std::vector<double>& x) {
    return 100 * std::pow(x[1] - x[0] * x[0], 2) + std::pow(1 - x[0], 2);
  };
  const Minimum found = nelder_mead(rosenbrock, {-1.2, 1.0}, 0.5, 1000);
  CHECK(found.x[0] == Approx(1.0).margin(1e-4));
  CHECK(found.x[1] == Approx(1.0).margin(1e-4));
}

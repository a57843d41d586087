#include "merge/weights.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "catch.h"

using namespace kiln;

namespace {

double total(const std::vector<double>& weights) { return std::accumulate(weights.begin(), weights.end(), 0.0); }

std::vector<double> weights_of(MergeMethod method, std::size_t count) {
  return merge_weights({.method = method}, count);
}

std::vector<double> schedule(DecayShape shape, std::size_t count, double final_ratio = 0.0) {
  return merge_weights({.method = MergeMethod::schedule, .shape = shape, .final_ratio = final_ratio}, count);
}

void check_equal(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    INFO("entry " << i);
    CHECK(std::abs(a[i] - b[i]) <= tolerance);
  }
}

}  // namespace

TEST_CASE("published weights of ten checkpoints at alpha 0.1") {
  const std::vector<double> ema = weights_of(MergeMethod::ema, 10);
  CHECK(std::round(ema.front() * 1000) == 387);
  CHECK(ema.back() == Approx(0.1));
  CHECK(total(ema) == Approx(1.0).epsilon(1e-14));

  const std::vector<double> closed =
      merge_weights({.method = MergeMethod::ema_closed, .alpha = 0.1, .normalise = false}, 10);
  CHECK(std::round(total(closed) * 1000) == 651);
  CHECK(closed.front() == Approx(0.1 * std::pow(0.9, 9)));

  CHECK(std::round(schedule(DecayShape::one_minus_sqrt, 10).front() * 1000) == 316);
}

TEST_CASE("ema weights are those of the recursion") {
  const double a = 0.3;
  const std::vector<double> weights = merge_weights({.method = MergeMethod::ema, .alpha = a}, 7);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    // The recursion on unit vectors: checkpoint k is 1 for k == i, else 0.
    double m = i == 0 ? 1.0 : 0.0;
    for (std::size_t k = 1; k < weights.size(); ++k) m = a * (k == i ? 1.0 : 0.0) + (1 - a) * m;
    CHECK(weights[i] == Approx(m).epsilon(1e-13));
  }
}

TEST_CASE("sma, wma, normalised closed ema and custom weights") {
  check_equal(weights_of(MergeMethod::sma, 4), {0.25, 0.25, 0.25, 0.25}, 0.0);
  check_equal(weights_of(MergeMethod::wma, 4), {0.1, 0.2, 0.3, 0.4}, 1e-15);
  const std::vector<double> closed = weights_of(MergeMethod::ema_closed, 10);
  CHECK(total(closed) == Approx(1.0).epsilon(1e-14));
  CHECK(closed[9] / closed[8] == Approx(1.0 / 0.9));
  const std::vector<double> given{1.0, 1.0, 2.0};
  check_equal(merge_weights({.method = MergeMethod::custom, .custom = given}, 3), {0.25, 0.25, 0.5}, 0.0);
  check_equal(merge_weights({.method = MergeMethod::custom, .custom = given, .normalise = false}, 3), given, 0.0);
}

TEST_CASE("one checkpoint keeps the whole weight, whatever the method") {
  for (const MergeMethod method : {MergeMethod::sma, MergeMethod::wma, MergeMethod::ema, MergeMethod::ema_closed,
                                   MergeMethod::schedule, MergeMethod::qam})
    check_equal(weights_of(method, 1), {1.0}, 1e-15);
}

TEST_CASE("a linear decay to zero is the plain average") {
  for (const std::size_t count : {2u, 10u, 37u})
    check_equal(schedule(DecayShape::linear, count), weights_of(MergeMethod::sma, count), 1e-15);
}

TEST_CASE("decay and weights agree with the definition") {
  const std::vector<double> decay{0.9, 0.6, 0.6, 0.1};
  // c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_n = w_n
  check_equal(weights_of_decay(decay), {0.1, 0.3, 0.0, 0.5, 0.1}, 1e-15);
  check_equal(decay_of_weights(std::vector<double>{0.1, 0.3, 0.0, 0.5, 0.1}), decay, 1e-15);
}

TEST_CASE("decay and weights round trip") {
  for (const DecayShape shape : {DecayShape::linear, DecayShape::cosine, DecayShape::one_minus_sqrt})
    for (const double final_ratio : {0.0, 0.1})
      for (const std::size_t updates : {1u, 9u, 1000u}) {
        const std::vector<double> decay = decay_factors(shape, updates, final_ratio);
        const std::vector<double> weights = weights_of_decay(decay);
        CHECK(total(weights) == Approx(1.0).epsilon(1e-12));
        check_equal(decay_of_weights(weights), decay, 1e-12);
      }
  for (const MergeMethod method :
       {MergeMethod::sma, MergeMethod::wma, MergeMethod::ema, MergeMethod::ema_closed, MergeMethod::qam}) {
    const std::vector<double> weights = weights_of(method, 50);
    check_equal(weights_of_decay(decay_of_weights(weights)), weights, 1e-12);
  }
}

TEST_CASE("a decay ends at its floor") {
  // x = j / 10: the last recorded update stands at 0.9 of the decay.
  CHECK(decay_factors(DecayShape::linear, 9, 0.1).back() == Approx(0.1 + 0.9 * 0.1));
  CHECK(decay_factors(DecayShape::cosine, 9)[4] == Approx(0.5));
  CHECK(decay_factors(DecayShape::one_minus_sqrt, 3)[0] == Approx(0.5));
}

TEST_CASE("what is no decay is refused") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_WITH(weights_of_decay(std::vector<double>{0.5, 0.6}), ContainsSubstring("decay factor 2 is 0.6"));
  CHECK_THROWS_AS(weights_of_decay(std::vector<double>{1.1}), Error);
  CHECK_THROWS_AS(weights_of_decay(std::vector<double>{0.5, -0.1}), Error);
  CHECK_THROWS_AS(weights_of_decay(std::vector<double>{nan}), Error);
  CHECK_THROWS_AS(decay_of_weights(std::vector<double>{}), Error);
  CHECK_THROWS_AS(decay_of_weights(std::vector<double>{0.5, 0.4}), Error);
  CHECK_THROWS_AS(decay_of_weights(std::vector<double>{-0.5, 1.5}), Error);
}

TEST_CASE("bad weight options are refused") {
  CHECK_THROWS_AS(weights_of(MergeMethod::sma, 0), Error);
  CHECK_THROWS_WITH(merge_weights({.method = MergeMethod::ema, .alpha = 0.0}, 3), ContainsSubstring("alpha is 0"));
  CHECK_THROWS_AS(merge_weights({.method = MergeMethod::ema_closed, .alpha = 1.5}, 3), Error);
  CHECK_THROWS_AS(schedule(DecayShape::linear, 3, 1.0), Error);
  CHECK_THROWS_WITH(merge_weights({.method = MergeMethod::custom, .custom = {1.0}}, 2),
                    ContainsSubstring("1 weights for 2 checkpoints"));
  CHECK_THROWS_AS(merge_weights({.method = MergeMethod::custom, .custom = {1.0, -1.0}}, 2), Error);
  CHECK_THROWS_AS(merge_weights({.method = MergeMethod::custom, .custom = {1.0, INFINITY}}, 2), Error);
  CHECK_THROWS_AS(merge_weights({.method = MergeMethod::schedule, .decay = {0.5, 0.2}}, 2), Error);
}

TEST_CASE("names of methods and shapes") {
  for (const char* name : {"sma", "wma", "ema", "ema-closed", "schedule", "custom"})
    CHECK(to_string(parse_merge_method(name)) == name);
  for (const char* name : {"linear", "cosine", "1-sqrt"}) CHECK(to_string(parse_decay_shape(name)) == name);
  CHECK_THROWS_WITH(parse_merge_method("swa"),
                    ContainsSubstring("'swa' does not exist; use one of sma, wma, ema, ema-closed, schedule, qam, "
                                      "custom"));
  CHECK_THROWS_AS(parse_decay_shape("exp"), Error);
}

TEST_CASE("weights that do not sum to 1 imply the decay of those that do") {
  const std::vector<double> closed =
      merge_weights({.method = MergeMethod::ema_closed, .alpha = 0.1, .normalise = false}, 10);
  check_equal(implied_decay(closed), decay_of_weights(weights_of(MergeMethod::ema_closed, 10)), 1e-14);
  CHECK(implied_decay(std::vector<double>{-0.5, 1.5}).empty());
}

#include "merge/sequence_loss.h"

#include <cmath>

#include "base/error.h"
#include "base/rng.h"
#include "catch.h"

using namespace kiln;

namespace {

/// Two models on `count` sequences: what is hard varies by 1, the models differ by 0.01 +- 0.05.
void draw(std::size_t count, SequenceLosses& a, SequenceLosses& b) {
  const Philox random(2, 7);
  for (std::uint64_t i = 0; i < count; ++i) {
    const double hard = 3 + random.normal(3 * i);
    a.nats.push_back(10 * (hard + 0.01 + 0.05 * random.normal(3 * i + 1)));
    b.nats.push_back(10 * hard);
    a.targets.push_back(10);
    b.targets.push_back(10);
  }
}

}  // namespace

TEST_CASE("paired differences by hand") {
  const SequenceLosses a{.nats = {3, 5, 10}, .targets = {1, 2, 2}}, b{.nats = {2, 5, 9}, .targets = {1, 2, 2}};
  CHECK(mean_loss(a) == Approx(18.0 / 5));
  const PairedDifference d = paired_difference(a, b);
  CHECK(d.mean == Approx(0.4));
  // Residuals 1 - 0.4, 0 - 0.8, 1 - 0.8.
  CHECK(d.standard_error == Approx(std::sqrt(1.5 * (0.36 + 0.64 + 0.04)) / 5));
}

TEST_CASE("pairing takes away what sequences share, and the bootstrap agrees") {
  SequenceLosses a, b;
  draw(2000, a, b);
  const PairedDifference d = paired_difference(a, b);
  CHECK(d.standard_error == Approx(0.05 / std::sqrt(2000.0)).epsilon(0.05));
  CHECK(std::abs(d.mean - 0.01) < 4 * d.standard_error);
  const Interval interval = bootstrap_difference(a, b, 1000, 3);
  CHECK(interval.high - interval.low == Approx(2 * 1.96 * d.standard_error).epsilon(0.1));
  CHECK(interval.low < d.mean);
  CHECK(interval.high > d.mean);
}

TEST_CASE("losses of other sequences are not paired") {
  const SequenceLosses a{.nats = {3, 5}, .targets = {1, 2}}, b{.nats = {2}, .targets = {1}},
      c{.nats = {3, 5}, .targets = {2, 1}};
  CHECK_THROWS_AS(paired_difference(a, b), Error);
  CHECK_THROWS_AS(paired_difference(a, c), Error);
  CHECK_THROWS_AS(paired_difference({}, {}), Error);
}

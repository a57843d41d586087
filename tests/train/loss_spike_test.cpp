#include "train/loss_spike.h"

#include <cmath>
#include <limits>

#include "catch.h"

using namespace kiln;

TEST_CASE("a spike is a loss far above the median, and never hides the next one") {
  LossSpike spike(1.5);
  for (int i = 0; i < 15; ++i) CHECK_FALSE(spike(100.0));  // too few to judge by
  CHECK(spike.median() == 0);
  for (int i = 0; i < 40; ++i) CHECK_FALSE(spike(2.0 + 0.01 * (i % 3)));
  CHECK(spike.median() == Approx(2.01).epsilon(0.01));
  for (int i = 0; i < 100; ++i) CHECK(spike(3.2));  // as often as it comes: it is not remembered
  CHECK_FALSE(spike(2.9));
  CHECK(spike(3.2));
}

TEST_CASE("losses that are not finite leave the detector as it was") {
  LossSpike spike(2);
  for (int i = 0; i < 20; ++i) CHECK_FALSE(spike(1.0));
  for (int i = 0; i < 200; ++i) {
    CHECK_FALSE(spike(std::nan("")));
    CHECK_FALSE(spike(std::numeric_limits<double>::infinity()));
  }
  CHECK(spike.median() == 1.0);
  CHECK_FALSE(spike(1.9));
  CHECK(spike(2.1));
}

TEST_CASE("the median follows the last 64 losses") {
  LossSpike spike(3);
  for (int i = 0; i < 64; ++i) spike(4.0);
  for (int i = 0; i < 40; ++i) CHECK_FALSE(spike(1.0));
  CHECK(spike.median() == 1.0);
  CHECK(spike(3.5));
}

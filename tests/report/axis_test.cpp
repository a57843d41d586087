#include "report/axis.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "catch.h"

using namespace kiln;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<std::string> labels(const AxisRange& range, int count) {
  std::vector<std::string> out;
  for (const Tick& tick : ticks(range, count))
    if (!tick.label.empty()) out.push_back(tick.label);
  return out;
}

}  // namespace

TEST_CASE("axis: linear ticks are round, and their labels share decimals and suffix") {
  using Labels = std::vector<std::string>;
  CHECK(labels({.low = 3.21, .high = 5.5}, 5) == Labels{"3.5", "4.0", "4.5", "5.0", "5.5"});
  CHECK(labels({.low = 0, .high = 131.1e6}, 6) == Labels{"0", "50M", "100M"});
  CHECK(labels({.low = 0, .high = 1.05e-5}, 4) == Labels{"0", "0.5·10⁻⁵", "1.0·10⁻⁵"});
  CHECK(labels({.low = -2, .high = 2}, 4) == Labels{"-2", "-1", "0", "1", "2"});
  CHECK(labels({.low = 0, .high = 12345}, 4) == Labels{"0", "5k", "10k"});
  CHECK(labels({.low = 0, .high = 6.0 * (1 << 30), .unit = Unit::bytes}, 4) == Labels{"0", "2 GiB", "4 GiB", "6 GiB"});
  CHECK(labels({.low = 0, .high = 1000, .unit = Unit::bytes}, 3) == Labels{"0", "500 B", "1000 B"});
}

TEST_CASE("axis: log ticks are decades, with 1, 2, 5 where there is room") {
  using Labels = std::vector<std::string>;
  CHECK(labels({.low = 1e-5, .high = 1e-1, .scale = Scale::log}, 6) == Labels{"10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1"});
  CHECK(labels({.low = 1, .high = 100, .scale = Scale::log}, 8) == Labels{"1", "2", "5", "10", "20", "50", "100"});
  CHECK(labels({.low = 2e-5, .high = 2e-4, .scale = Scale::log}, 8) == Labels{"2·10⁻⁵", "5·10⁻⁵", "10⁻⁴", "2·10⁻⁴"});
  CHECK(labels({.low = 3, .high = 10, .scale = Scale::log}, 5) == Labels{"4", "6", "8", "10"});
  CHECK(labels({.low = 1e-12, .high = 1e12, .scale = Scale::log}, 6).size() <= 7);
  CHECK(labels({.low = 1e5, .high = 1e8, .scale = Scale::log}, 4) == Labels{"100k", "1M", "10M", "100M"});
}

TEST_CASE("axis: ticks lie within the range and are few, for any range") {
  for (double low = -1e7; low < 1e7; low = low * -0.83 + 17) {
    if (std::abs(low) < 20) break;
    for (const double span : {1e-3, 0.7, 33.0, 5e8}) {
      const AxisRange range{.low = low, .high = low + span};
      const auto all = ticks(range, 6);
      CHECK(all.size() >= 2);
      CHECK(all.size() <= 7);
      for (const Tick& tick : all) {
        CHECK(range.position(tick.value) >= -1e-6);
        CHECK(range.position(tick.value) <= 1 + 1e-6);
      }
    }
  }
}

TEST_CASE("axis: ranges skip what cannot be shown") {
  const AxisRange linear = fit_range({}, {kNan, 2, HUGE_VAL, 4}, 0);
  CHECK(linear.low == 2);
  CHECK(linear.high == 4);
  CHECK(std::isnan(linear.position(kNan)));
  const AxisRange log = fit_range({.scale = Scale::log}, {0, -3, 10, 1000}, 0);
  CHECK(log.low == Approx(10));
  CHECK(log.high == Approx(1000));
  CHECK(log.position(100) == Approx(0.5));
  CHECK(std::isnan(log.position(0)));
  CHECK(fit_range({}, {}, 0.05).low < fit_range({}, {}, 0.05).high);
  CHECK(fit_range({.scale = Scale::log}, {}, 0.05).low > 0);
  CHECK(fit_range({}, {7}, 0).low < 7);
  CHECK(fit_range({.scale = Scale::log}, {7}, 0).low > 0);
  CHECK(fit_range({.include_zero = true}, {5, 7}, 0.1).low == 0);
  CHECK(fit_range({.max = 6}, {5, 9}, 0.1).high == 6);
  CHECK_THROWS_AS(fit_range({.scale = Scale::log, .min = 0}, {1, 2}, 0), Error);
}

TEST_CASE("axis: values for people") {
  CHECK(value_label(3.51, Unit::number) == "3.510");
  CHECK(value_label(0.01, Unit::number) == "0.01");
  CHECK(value_label(0, Unit::number) == "0");
  CHECK(value_label(1234.5, Unit::number) == "1234");
  CHECK(value_label(123456, Unit::number) == "123k");
  CHECK(value_label(3.2e-5, Unit::number) == "3.2·10⁻⁵");
  CHECK(value_label(1536, Unit::bytes) == "1.50 KiB");
  CHECK(value_label(kNan, Unit::number) == "–");
}

TEST_CASE("axis: spread keeps a gap and the order, and moves least") {
  CHECK(spread({}, 10, 0, 100).empty());
  CHECK(spread({50, 20}, 10, 0, 100) == std::vector<double>{50, 20});
  CHECK(spread({50, 50}, 10, 0, 100) == std::vector<double>{45, 55});
  CHECK(spread({99, 98, 10}, 10, 0, 100) == std::vector<double>{100, 90, 10});
  CHECK(spread({-5, -5}, 10, 0, 100) == std::vector<double>{0, 10});
  const std::vector<double> many = spread({5, 5, 5, 5, 5}, 10, 0, 20);
  CHECK(many == std::vector<double>{0, 5, 10, 15, 20});
  std::vector<double> placed = spread({31, 30, 33, 80, 79, 2}, 15, 0, 100);
  std::sort(placed.begin(), placed.end());
  for (std::size_t i = 1; i < placed.size(); ++i) CHECK(placed[i] - placed[i - 1] >= 15 - 1e-9);
}

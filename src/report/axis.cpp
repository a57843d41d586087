#include "report/axis.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string_view>

#include "base/error.h"
#include "base/text.h"

namespace kiln {
namespace {

constexpr double kLargest = 1e100;  // beyond it (on a log axis also below its inverse) a value does not widen an axis
constexpr double kTiny = 1e-9;      // of a step: rounding of a tick's position

/// The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `count` steps.
double nice_step(double span, int count) {
  const double raw = span / std::max(count, 1);
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double multiple : {1.0, 2.0, 5.0})
    if (multiple * power >= raw * (1 - kTiny)) return multiple * power;
  return 10 * power;
}

int decimals_of(double step) { return std::max(0, static_cast<int>(-std::floor(std::log10(step) + kTiny))); }

std::string superscript(int value) {
  constexpr std::array<std::string_view, 10> kDigits{"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
  std::string out = value < 0 ? "⁻" : "";
  for (const char digit : std::to_string(std::abs(value))) out += kDigits[static_cast<std::size_t>(digit - '0')];
  return out;
}

/// The divisor and the suffix that the labels of one axis share.
struct Notation {
  double divisor = 1;
  std::string suffix;
};

Notation notation_of(double largest, Unit unit) {
  if (unit == Unit::bytes) {
    constexpr std::array<std::string_view, 5> kUnits{" B", " KiB", " MiB", " GiB", " TiB"};
    std::size_t i = 0;
    double divisor = 1;
    for (; largest / divisor >= 1024 && i + 1 < kUnits.size(); ++i) divisor *= 1024;
    return {divisor, std::string(kUnits[i])};
  }
  if (largest >= 1e4) {
    constexpr std::array<std::string_view, 4> kSuffixes{"k", "M", "B", "T"};
    std::size_t i = 0;
    double divisor = 1e3;
    for (; largest / divisor >= 1e3 && i + 1 < kSuffixes.size(); ++i) divisor *= 1e3;
    return {divisor, std::string(kSuffixes[i])};
  }
  if (largest > 0 && largest < 1e-3) {
    const int exponent = static_cast<int>(std::floor(std::log10(largest) + kTiny));
    return {std::pow(10.0, exponent), "·10" + superscript(exponent)};
  }
  return {};
}

std::vector<Tick> linear_ticks(const AxisRange& range, int max_count) {
  const Notation notation = notation_of(std::max(std::abs(range.low), std::abs(range.high)), range.unit);
  const double step = nice_step((range.high - range.low) / notation.divisor, max_count);
  const double low = range.low / notation.divisor, high = range.high / notation.divisor;
  std::vector<Tick> out;
  for (double i = std::ceil(low / step - kTiny); i * step <= high + kTiny * step; ++i) {
    const bool zero = i == 0;
    out.push_back({i * step * notation.divisor,
                   zero ? "0" : fmt::format("{:.{}f}{}", i * step, decimals_of(step), notation.suffix)});
  }
  return out;
}

std::string log_label(double value, Unit unit) {
  if (unit == Unit::bytes) return human_bytes(static_cast<std::uint64_t>(value));
  if (value >= 1e3) return value_label(value, unit);
  if (value >= 0.999e-3) return fmt::format("{:g}", value);
  const int exponent = static_cast<int>(std::floor(std::log10(value) + kTiny));
  const double mantissa = std::round(value / std::pow(10.0, exponent));
  return (mantissa == 1 ? "10" : fmt::format("{:g}·10", mantissa)) + superscript(exponent);
}

std::vector<Tick> log_ticks(const AxisRange& range, int max_count) {
  const double decades = std::log10(range.high / range.low);
  const int stride = std::max(1, static_cast<int>(std::ceil(decades / max_count)));
  const bool label_within = 3 * decades <= max_count + 1;  // room for 1, 2 and 5 of each decade
  std::vector<Tick> out;
  for (int e = static_cast<int>(std::floor(std::log10(range.low))); std::pow(10.0, e) <= range.high; ++e) {
    for (int m = 1; m <= 9; ++m) {
      const double value = m * std::pow(10.0, e);
      if (value < range.low * (1 - kTiny) || value > range.high * (1 + kTiny)) continue;
      const bool labelled = m == 1 ? e % stride == 0 : label_within && (m == 2 || m == 5);
      if (!labelled && stride > 1) continue;
      out.push_back({value, labelled ? log_label(value, range.unit) : ""});
    }
  }
  return out;
}

}  // namespace

double AxisRange::position(double value) const {
  if (!std::isfinite(value) || (scale == Scale::log && value <= 0)) return std::numeric_limits<double>::quiet_NaN();
  return scale == Scale::log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
}

AxisRange fit_range(const Axis& axis, const std::vector<double>& values, double padding) {
  const bool log = axis.scale == Scale::log;
  check(!log || (axis.min.value_or(1) > 0 && axis.max.value_or(1) > 0),
        "axis \"{}\": limits {} and {} on a log scale; give positive ones", axis.label, axis.min.value_or(1),
        axis.max.value_or(1));
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const double value : values) {
    if (!(std::abs(value) < kLargest) || (log && value < 1 / kLargest)) continue;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (low > high) low = log ? 1 : 0, high = log ? 10 : 1;
  if (axis.include_zero && !log) low = std::min(low, 0.0), high = std::max(high, 0.0);
  if (low == high) {  // one value: room on both sides of it
    const double room = low == 0 ? 1 : 0.1 * std::abs(low);
    low -= room;
    high += room;
  }
  const double factor = log ? std::pow(high / low, padding) : 1;
  const double room = padding * (high - low);
  const bool at_zero = axis.include_zero && low == 0;
  AxisRange range{.low = axis.min.value_or(log       ? low / factor
                                           : at_zero ? 0
                                                     : low - room),
                  .high = axis.max.value_or(log ? high * factor : high + room),
                  .scale = axis.scale,
                  .unit = axis.unit};
  if (!(range.low < range.high)) range.high = range.low + std::max(1.0, std::abs(range.low));
  return range;
}

std::vector<Tick> ticks(const AxisRange& range, int max_count) {
  return range.scale == Scale::log && range.high / range.low >= 5 ? log_ticks(range, max_count)
                                                                  : linear_ticks(range, max_count);
}

std::string value_label(double value, Unit unit) {
  if (!std::isfinite(value)) return "–";
  if (unit == Unit::bytes) return human_bytes(static_cast<std::uint64_t>(std::max(value, 0.0)));
  const Notation notation = notation_of(std::abs(value), unit);
  const double shown = value / notation.divisor;
  if (notation.divisor > 1) return fmt::format("{:.3g}{}", shown, notation.suffix);
  if (notation.divisor < 1) return fmt::format("{:.2g}{}", shown, notation.suffix);
  if (std::abs(value) < 1) return fmt::format("{:.4g}", value);
  return fmt::format("{:.{}f}", value, 3 - static_cast<int>(std::floor(std::log10(std::abs(value)))));
}

std::vector<double> spread(const std::vector<double>& wanted, double gap, double low, double high) {
  const std::size_t n = wanted.size();
  if (n == 0) return {};
  if (n > 1) gap = std::min(gap, (high - low) / static_cast<double>(n - 1));
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return wanted[a] < wanted[b]; });
  // With the gaps subtracted, the least-squares answer is an isotonic regression: pool adjacent violators.
  struct Block {
    double sum;
    std::size_t count;
    double mean() const { return sum / static_cast<double>(count); }
  };
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < n; ++i) {
    blocks.push_back({wanted[order[i]] - gap * static_cast<double>(i), 1});
    while (blocks.size() > 1 && blocks[blocks.size() - 2].mean() > blocks.back().mean()) {
      const Block last = blocks.back();
      blocks.pop_back();
      blocks.back() = {blocks.back().sum + last.sum, blocks.back().count + last.count};
    }
  }
  std::vector<double> out(n);
  const double top = std::max(low, high - gap * static_cast<double>(n - 1));
  std::size_t i = 0;
  for (const Block& block : blocks)
    for (std::size_t k = 0; k < block.count; ++k, ++i)
      out[order[i]] = std::clamp(block.mean(), low, top) + gap * static_cast<double>(i);
  return out;
}

}  // namespace kiln

#pragma once
#include <optional>
#include <string>
#include <vector>

namespace kiln {

enum class Scale { linear, log };
enum class Unit { number, bytes };

struct Axis {
  std::string label{};  ///< with its unit: "Loss (nats)"
  Scale scale = Scale::linear;
  Unit unit = Unit::number;     ///< how ticks are written: "20M", or "1.5 GiB"
  bool include_zero = false;    ///< linear only
  std::optional<double> min{};  ///< otherwise from the data
  std::optional<double> max{};
};

/// A closed interval of data values on an axis, low < high (both positive on a log axis).
struct AxisRange {
  double low = 0, high = 1;
  Scale scale = Scale::linear;
  Unit unit = Unit::number;

  /// 0 at `low`, 1 at `high`; NaN for what the axis cannot show (not finite, or not positive on a log axis).
  double position(double value) const;
};

/// The range that shows the finite (on a log axis: positive) values, widened by the share `padding` on the sides that
/// `axis` does not give. No values: [0, 1], or [1, 10] on a log axis. A usage Error for a limit that
/// is not positive on a log axis.
AxisRange fit_range(const Axis& axis, const std::vector<double>& values, double padding);

struct Tick {
  double value = 0;
  std::string label{};  ///< "" for a minor tick of a log axis
};

/// Ticks at round values within the range: multiples of 1, 2 or 5 times a power of ten (for bytes: in a binary unit),
/// and on a log axis of a decade or more the powers of ten, or 1, 2, 5 of each. At most about `max_count` labels.
std::vector<Tick> ticks(const AxisRange& range, int max_count);

/// A value for people: about four digits, "12.3k" from 10,000 on, "3·10⁻⁵" below 0.001, bytes as "1.50 GiB".
std::string value_label(double value, Unit unit);

/// Moves positions apart to at least `gap` within [low, high], keeping their order and moving them least (in squares).
/// Returns as many as were given; when they do not all fit, they are evenly spread.
std::vector<double> spread(const std::vector<double>& wanted, double gap, double low, double high);

}  // namespace kiln

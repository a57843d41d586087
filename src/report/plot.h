#pragma once
#include <optional>
#include <string>
#include <vector>

#include "report/axis.h"

namespace kiln {

enum class Mark { line, points };

/// One curve, or a set of single points. Values that are not finite break a line.
struct Series {
  std::string name{};
  std::vector<double> x{}, y{};  ///< of one length; x ascending for a line
  Mark mark = Mark::line;
  double smoothing = 0;  ///< exponential: weight of the past per point, in [0, 1); the raw curve stays faint behind
  std::optional<std::size_t> colour{};  ///< index of the palette; the series' position unless given
  bool dashed = false;
};

struct PlotOptions {
  std::string title{}, subtitle{};
  Axis x{}, y{};
  int width = 760, height = 400;  ///< pixels
  bool legend = true;             ///< for more than one series
  bool end_labels = true;         ///< name and last value at each line's end
};

/// A self-contained SVG figure on a white background. A usage Error when a series has x and y of different lengths.
std::string svg_plot(const PlotOptions& options, const std::vector<Series>& series);

/// y[i] <- (1 - w) sum_j w^(i-j) y[j] / (1 - w^(i+1)): the exponential average without the bias of its start. Values
/// that are not finite are skipped and stay as they are.
std::vector<double> smooth(const std::vector<double>& y, double weight);

/// One bar: a value, or several stacked.
struct Bar {
  std::string name{};
  std::vector<double> parts{};
  std::optional<std::size_t> colour{};  ///< for bars of one part; the first of the palette unless given
};

struct BarOptions {
  std::string title{}, subtitle{};
  std::string value_label{};  ///< below the axis, with its unit
  Unit unit = Unit::bytes;
  std::vector<std::string> parts{};  ///< names of the stacked parts, for the legend
  std::optional<double> limit{};     ///< a dashed line across, such as a memory budget
  std::string limit_label{};
  int width = 760;
};

/// Horizontal bars with their totals at the ends, such as bytes by optimizer. A usage Error for a negative value or a
/// bar without parts.
std::string svg_bars(const BarOptions& options, const std::vector<Bar>& bars);

/// Differences to a reference over two choices. Below zero is better, and blue; above is orange.
struct HeatMap {
  std::string title{}, subtitle{};
  std::string row_label{}, column_label{};
  std::vector<std::string> rows{}, columns{};
  std::vector<double> values{};  ///< row by row; not finite: an empty cell
  int width = 640;
};

/// Cells with their values, coloured by size up to the best one's. A usage Error when there are not as many values as
/// cells.
std::string svg_heat_map(const HeatMap& map);

}  // namespace kiln

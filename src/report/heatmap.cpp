#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "report/plot.h"
#include "report/svg.h"

namespace kiln {
namespace {

constexpr double kEdge = 16, kCellHeight = 34, kLabelSize = 12, kMaxCellWidth = 110;

using Rgb = std::array<double, 3>;
constexpr Rgb kWhite{255, 255, 255}, kBelow{0, 114, 178}, kAbove{213, 94, 0};  // the palette's first two colours

/// White at 0, full colour at -scale and at +scale and beyond.
Rgb colour_of(double value, double scale) {
  const double share = scale > 0 ? std::min(1.0, std::abs(value) / scale) : 0.0;
  const Rgb& end = value < 0 ? kBelow : kAbove;
  Rgb colour{};
  for (std::size_t i = 0; i < 3; ++i) colour[i] = kWhite[i] + share * (end[i] - kWhite[i]);
  return colour;
}

std::string hex(const Rgb& c) {
  return fmt::format("#{:02x}{:02x}{:02x}", std::lround(c[0]), std::lround(c[1]), std::lround(c[2]));
}

/// Dark text on light cells, and the other way round (relative luminance of ITU-R BT.709).
std::string_view ink_on(const Rgb& c) { return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] > 140 ? kInk : "#ffffff"; }

std::string draw_cell(double x, double y, double width, double value, double scale) {
  const Rgb fill = std::isfinite(value) ? colour_of(value, scale) : kWhite;
  const std::string text = std::isfinite(value) ? fmt::format("{:+.4f}", value) : "–";
  return fmt::format(
             "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\" fill=\"{}\" stroke=\"#ffffff\"/>\n", x, y,
             width, kCellHeight, hex(fill)) +
         svg_text(x + width / 2, y + kCellHeight / 2 + 4, text,
                  {.size = kLabelSize, .fill = std::isfinite(value) ? ink_on(fill) : kMutedInk, .anchor = "middle"});
}

}  // namespace

std::string svg_heat_map(const HeatMap& map) {
  check(map.values.size() == map.rows.size() * map.columns.size(), "heat map \"{}\": {} values for {} x {} cells",
        map.title, map.values.size(), map.rows.size(), map.columns.size());
  double scale = 0, row_width = text_width(map.row_label, kLabelSize);
  // What is worse than the reference may be so by any amount; the scale is that of what is better.
  for (const double value : map.values)
    if (std::isfinite(value)) scale = std::max(scale, -value);
  for (const std::string& row : map.rows) row_width = std::max(row_width, text_width(row, kLabelSize));
  const double left = kEdge + row_width + 12;
  const double room = (map.width - kEdge - left) / static_cast<double>(std::max<std::size_t>(map.columns.size(), 1));
  const double cell = std::min(room, kMaxCellWidth);
  const double top = svg_heading_height(map.title, map.subtitle) + 40;
  const double bottom = top + kCellHeight * static_cast<double>(map.rows.size());

  std::string out = svg_begin(map.width, static_cast<int>(bottom + kEdge), map.title, map.subtitle);
  out += svg_text(left, top - 24, map.column_label, {.size = kLabelSize});
  out += svg_text(left - 12, top - 6, map.row_label, {.size = kLabelSize, .anchor = "end"});
  for (std::size_t c = 0; c < map.columns.size(); ++c)
    out += svg_text(left + cell * (static_cast<double>(c) + 0.5), top - 6, map.columns[c],
                    {.size = kLabelSize, .fill = kInk, .anchor = "middle"});
  for (std::size_t r = 0; r < map.rows.size(); ++r) {
    const double y = top + kCellHeight * static_cast<double>(r);
    out +=
        svg_text(left - 12, y + kCellHeight / 2 + 4, map.rows[r], {.size = kLabelSize, .fill = kInk, .anchor = "end"});
    for (std::size_t c = 0; c < map.columns.size(); ++c)
      out += draw_cell(left + cell * static_cast<double>(c), y, cell, map.values[r * map.columns.size() + c], scale);
  }
  return out + "</svg>\n";
}

}  // namespace kiln

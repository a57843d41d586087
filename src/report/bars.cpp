#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "report/plot.h"
#include "report/svg.h"

namespace kiln {
namespace {

constexpr double kEdge = 16, kRow = 30, kBarHeight = 18, kTickSize = 11, kLabelSize = 12, kMaxNameWidth = 220;

double total_of(const Bar& bar) { return std::accumulate(bar.parts.begin(), bar.parts.end(), 0.0); }

void check_bars(const std::vector<Bar>& bars) {
  for (const Bar& bar : bars) {
    check(!bar.parts.empty(), "bar \"{}\": no values; give one or more", bar.name);
    for (const double part : bar.parts)
      check(std::isfinite(part) && part >= 0, "bar \"{}\": value {}; give finite values of 0 or more", bar.name, part);
  }
}

std::string rect(double x, double y, double width, std::string_view fill, std::string_view title) {
  return fmt::format(
      "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\" fill=\"{}\" "
      "stroke=\"#ffffff\"><title>{}</title></rect>\n",
      x, y, std::max(width, 0.5), kBarHeight, fill, escape_xml(title));
}

std::string draw_legend(const std::vector<std::string>& parts, double y) {
  std::string out;
  double x = kEdge;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    out += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"12\" height=\"12\" fill=\"{}\"/>\n", x, y - 6,
                       palette(i).line);
    out += svg_text(x + 18, y + 4, parts[i], {.size = kLabelSize, .fill = kInk});
    x += 18 + text_width(parts[i], kLabelSize) + 18;
  }
  return out;
}

/// The bar's pieces from `left` on; returns where they end.
double draw_bar(std::string& out, const Bar& bar, const BarOptions& options, double left, double y, double scale) {
  double x = left;
  for (std::size_t i = 0; i < bar.parts.size(); ++i) {
    const std::size_t colour = bar.parts.size() > 1 ? i : bar.colour.value_or(0);
    const std::string value = value_label(bar.parts[i], options.unit);
    const std::string part = i < options.parts.size() ? options.parts[i] + ": " : "";
    out += rect(x, y, bar.parts[i] * scale, palette(colour).line, bar.name + ", " + part + value);
    x += bar.parts[i] * scale;
  }
  return x;
}

}  // namespace

std::string svg_bars(const BarOptions& options, const std::vector<Bar>& bars) {
  check_bars(bars);
  double name_width = 0, label_width = 0;
  std::vector<double> values{options.limit.value_or(0)};
  for (const Bar& bar : bars) {
    values.push_back(total_of(bar));
    name_width = std::max(name_width, text_width(fit_text(bar.name, kLabelSize, kMaxNameWidth), kLabelSize));
    label_width = std::max(label_width, text_width(value_label(values.back(), options.unit), kLabelSize));
  }
  AxisRange range = fit_range({.unit = options.unit, .include_zero = true}, values, 0);
  const bool legend = !options.parts.empty();
  const double left = kEdge + name_width + 10, right = options.width - kEdge - label_width - 10;
  const double top = svg_heading_height(options.title, options.subtitle) + (legend ? 26 : 8) + (options.limit ? 16 : 0);
  const double bottom = top + kRow * static_cast<double>(bars.size()) + 4;
  const double scale = (right - left) / (range.high - range.low);

  std::string out = svg_begin(options.width, static_cast<int>(bottom) + 50, options.title, options.subtitle);
  if (legend) out += draw_legend(options.parts, svg_heading_height(options.title, options.subtitle) + 10);
  for (const Tick& tick : ticks(range, static_cast<int>((right - left) / 90))) {
    const double x = left + (tick.value - range.low) * scale;
    out += svg_line(x, top, x, bottom, kGridInk, 1);
    out += svg_text(x, bottom + 17, tick.label, {.size = kTickSize, .anchor = "middle"});
  }
  for (std::size_t i = 0; i < bars.size(); ++i) {
    const double y = top + kRow * static_cast<double>(i) + (kRow - kBarHeight) / 2;
    const double end = draw_bar(out, bars[i], options, left, y, scale);
    const double baseline = y + kBarHeight / 2 + 4;
    const std::string name = fit_text(bars[i].name, kLabelSize, kMaxNameWidth);
    out += svg_text(left - 8, baseline, name, {.size = kLabelSize, .fill = kInk, .anchor = "end"});
    const std::string value = value_label(total_of(bars[i]), options.unit);
    out += svg_text(end + 7, baseline, value, {.size = kLabelSize, .fill = kInk, .weight = "500"});
  }
  out += svg_line(left, top, left, bottom, kAxisInk, 1);
  if (options.limit) {
    const double x = left + (*options.limit - range.low) * scale;
    out +=
        fmt::format("<path d=\"M{:.1f} {:.1f}V{:.1f}\" stroke=\"{}\" stroke-width=\"1.5\" stroke-dasharray=\"5 4\"/>\n",
                    x, top - 4, bottom, kInk);
    out += svg_text(x, top - 9, options.limit_label, {.size = kTickSize, .fill = kInk, .anchor = "middle"});
  }
  out += svg_text((left + right) / 2, bottom + 36, options.value_label, {.size = kLabelSize, .anchor = "middle"});
  return out + "</svg>\n";
}

}  // namespace kiln

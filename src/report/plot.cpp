#include "report/plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

#include "base/error.h"
#include "report/svg.h"

namespace kiln {
namespace {

constexpr double kEdge = 16, kTickSize = 11, kLabelSize = 12, kLabelGap = 15;
constexpr int kLegendRow = 18;
constexpr double kMaxNameWidth = 170, kBottom = 46, kTickEvery = 48, kXTickEvery = 80;
constexpr double kFarAway = 1e4;  // pixels: clipped anyway, and renderers dislike more

/// A series as it is drawn, in data units.
struct Curve {
  const Series* series;
  std::vector<double> y;  // smoothed where asked for
  Colour colour;
  bool dashed;
  std::optional<std::size_t> last;  // of the last point that can be shown
};

/// Where the axes lie, in pixels.
struct Frame {
  double left = 0, top = 0, right = 0, bottom = 0;
  AxisRange x, y;

  double px(double value) const { return left + x.position(value) * (right - left); }
  double py(double value) const {
    const double at = bottom - y.position(value) * (bottom - top);
    return std::isnan(at) ? at : std::clamp(at, -kFarAway, kFarAway);
  }
  bool shows(double at_x, double at_y) const {
    return at_x >= left - 0.5 && at_x <= right + 0.5 && at_y >= top - 0.5 && at_y <= bottom + 0.5;
  }
};

std::vector<Curve> curves_of(const std::vector<Series>& series) {
  std::vector<Curve> curves;
  for (std::size_t i = 0; i < series.size(); ++i) {
    const Series& s = series[i];
    check(s.x.size() == s.y.size(), "plot series \"{}\": {} values of x and {} of y; give as many of each", s.name,
          s.x.size(), s.y.size());
    const std::size_t index = s.colour.value_or(i);
    curves.push_back({&s, s.smoothing > 0 ? smooth(s.y, s.smoothing) : s.y, palette(index),
                      s.dashed || index >= kPaletteSize, std::nullopt});
  }
  return curves;
}

/// The ranges of both axes from the points that can be shown.
void fit(Frame& frame, const PlotOptions& options, const std::vector<Curve>& curves) {
  std::vector<double> xs, ys;
  for (const Curve& curve : curves) {
    for (std::size_t i = 0; i < curve.y.size(); ++i) {
      const double x = curve.series->x[i];
      const bool outside = x < options.x.min.value_or(x) || x > options.x.max.value_or(x);
      if (outside || !std::isfinite(curve.series->y[i])) continue;
      xs.push_back(x);
      ys.push_back(curve.series->y[i]);
      ys.push_back(curve.y[i]);
    }
  }
  frame.x = fit_range(options.x, xs, 0);
  frame.y = fit_range(options.y, ys, 0.05);
}

void find_ends(const Frame& frame, std::vector<Curve>& curves) {
  for (Curve& curve : curves)
    for (std::size_t i = 0; i < curve.y.size(); ++i)
      if (std::isfinite(frame.px(curve.series->x[i])) && std::isfinite(frame.py(curve.y[i]))) curve.last = i;
}

std::string end_text(const Curve& curve, const PlotOptions& options, bool with_name) {
  const std::string value = value_label(curve.y[*curve.last], options.y.unit);
  return with_name ? fit_text(curve.series->name, kLabelSize, kMaxNameWidth) + "  " + value : value;
}

/// Path data of a line, with at most four points a pixel column (first, lowest, highest, last), so that the size of a
/// figure does not grow with the run and no spike is lost.
class PathBuilder {
 public:
  void add(double x, double y) {
    if (!std::isfinite(x) || !std::isfinite(y)) {
      flush();
      open_ = false;
      return;
    }
    if (count_ > 0 && std::floor(x) != std::floor(points_[0].x)) flush();
    const Point point{x, y, count_};
    if (count_ == 0) points_.fill(point);
    if (y < points_[1].y) points_[1] = point;
    if (y > points_[2].y) points_[2] = point;
    points_[3] = point;
    ++count_;
  }
  std::string finish() {
    flush();
    return std::move(out_);
  }

 private:
  struct Point {
    double x, y;
    std::size_t order;
  };
  void flush() {
    if (count_ == 0) return;
    std::sort(points_.begin() + 1, points_.begin() + 3, [](auto& a, auto& b) { return a.order < b.order; });
    for (std::size_t i = 0; i < points_.size(); ++i) {
      if (i > 0 && points_[i].order == points_[i - 1].order) continue;
      fmt::format_to(std::back_inserter(out_), "{}{:.1f} {:.1f}", open_ ? "L" : "M", points_[i].x, points_[i].y);
      open_ = true;
    }
    count_ = 0;
  }

  std::string out_;
  std::array<Point, 4> points_{};  // of this pixel column: first, lowest, highest, last
  std::size_t count_ = 0;
  bool open_ = false;
};

std::string path(const Frame& frame, const std::vector<double>& x, const std::vector<double>& y,
                 std::string_view style) {
  PathBuilder builder;
  for (std::size_t i = 0; i < x.size(); ++i) builder.add(frame.px(x[i]), frame.py(y[i]));
  return fmt::format("<path d=\"{}\" fill=\"none\" stroke-linejoin=\"round\" {}/>\n", builder.finish(), style);
}

std::string draw_axes(const Frame& frame, const PlotOptions& options, const std::vector<Tick>& x_ticks,
                      const std::vector<Tick>& y_ticks) {
  std::string out;
  for (const Tick& tick : y_ticks) {
    const double y = frame.py(tick.value);
    out += svg_line(frame.left, y, frame.right, y, kGridInk, tick.label.empty() ? 0.5 : 1);
    if (!tick.label.empty()) out += svg_text(frame.left - 8, y + 4, tick.label, {.size = kTickSize, .anchor = "end"});
  }
  for (const Tick& tick : x_ticks) {
    const double x = frame.px(tick.value);
    out += svg_line(x, frame.top, x, frame.bottom, kGridInk, tick.label.empty() ? 0.5 : 1);
    if (tick.label.empty()) continue;
    out += svg_line(x, frame.bottom, x, frame.bottom + 4, kAxisInk, 1);
    out += svg_text(x, frame.bottom + 17, tick.label, {.size = kTickSize, .anchor = "middle"});
  }
  out += svg_line(frame.left, frame.bottom, frame.right, frame.bottom, kAxisInk, 1);
  out += svg_text(kEdge, frame.top - 10, options.y.label, {.size = kLabelSize});
  out += svg_text((frame.left + frame.right) / 2, frame.bottom + 36, options.x.label,
                  {.size = kLabelSize, .anchor = "middle"});
  return out;
}

std::string draw_no_data(const Frame& frame, const std::vector<Curve>& curves) {
  if (std::any_of(curves.begin(), curves.end(), [](const Curve& curve) { return curve.last.has_value(); })) return "";
  return svg_text((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2, "no data",
                  {.size = kLabelSize, .anchor = "middle"});
}

/// A disc at the end of a line, a diamond for a single point.
std::string marker(double x, double y, const Curve& curve, std::string_view tooltip) {
  const bool point = curve.series->mark == Mark::points;
  const std::string shape = point ? fmt::format("path d=\"M{:.1f} {:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z\"", x, y - 6.5)
                                  : fmt::format("circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\"", x, y);
  return fmt::format("<{} fill=\"{}\" stroke=\"#ffffff\" stroke-width=\"1.5\"><title>{}</title></{}>\n", shape,
                     curve.colour.line, escape_xml(tooltip), point ? "path" : "circle");
}

std::string draw_curves(const Frame& frame, const PlotOptions& options, const std::vector<Curve>& curves) {
  // A nested svg element clips without needing an id, which would have to be unique in a page of several figures.
  std::string out = fmt::format(
      "<svg x=\"{0:.1f}\" y=\"{1:.1f}\" width=\"{2:.1f}\" height=\"{3:.1f}\" "
      "viewBox=\"{0:.1f} {1:.1f} {2:.1f} {3:.1f}\">\n",
      frame.left, frame.top, frame.right - frame.left, frame.bottom - frame.top);
  for (const bool raw : {true, false}) {
    for (const Curve& curve : curves) {
      const Series& s = *curve.series;
      if (s.mark == Mark::points || (raw && !(s.smoothing > 0))) continue;
      const char* width = raw ? "stroke-width=\"1\" stroke-opacity=\"0.25\"" : "stroke-width=\"2\"";
      const char* dash = curve.dashed && !raw ? "stroke-dasharray=\"6 4\"" : "";
      out += path(frame, s.x, raw ? s.y : curve.y, fmt::format("stroke=\"{}\" {} {}", curve.colour.line, width, dash));
    }
  }
  out += "</svg>\n";
  for (const Curve& curve : curves) {
    const Series& s = *curve.series;
    for (std::size_t i = 0; i < s.x.size(); ++i) {
      const bool end = i == curve.last;
      const double x = frame.px(s.x[i]), y = frame.py(curve.y[i]);
      if ((s.mark == Mark::line && !end) || !frame.shows(x, y)) continue;
      out += marker(x, y, curve, s.name + ": " + value_label(curve.y[i], options.y.unit));
    }
  }
  return out;
}

/// The room that labels at the line ends need; 0 for none, also when there are too many for the height.
double labels_width(const Frame& frame, const PlotOptions& options, const std::vector<Curve>& curves) {
  if (!options.end_labels || static_cast<double>(curves.size()) * kLabelGap > frame.bottom - frame.top) return 0;
  double width = 0;
  for (const Curve& curve : curves)
    if (curve.last) width = std::max(width, text_width(end_text(curve, options, curves.size() > 1), kLabelSize) + 8);
  return width;
}

std::string draw_end_labels(const Frame& frame, const PlotOptions& options, const std::vector<Curve>& curves) {
  std::vector<const Curve*> labelled;
  std::vector<double> wanted;
  for (const Curve& curve : curves) {
    if (!curve.last) continue;
    labelled.push_back(&curve);
    wanted.push_back(std::clamp(frame.py(curve.y[*curve.last]), frame.top, frame.bottom));
  }
  const std::vector<double> placed = spread(wanted, kLabelGap, frame.top, frame.bottom);
  std::string out;
  for (std::size_t i = 0; i < labelled.size(); ++i) {
    const Curve& curve = *labelled[i];
    const double end = frame.px(curve.series->x[*curve.last]);
    const double at = frame.right + 14;
    if (std::abs(placed[i] - wanted[i]) > 3 || frame.right - end > 10)
      out += fmt::format(
          "<path d=\"M{:.1f} {:.1f}L{:.1f} {:.1f}\" fill=\"none\" stroke=\"{}\" stroke-width=\"0.75\" "
          "stroke-opacity=\"0.6\"/>\n",
          end + 5, wanted[i], at - 3, placed[i], curve.colour.line);
    out += svg_text(at, placed[i] + 4, end_text(curve, options, curves.size() > 1),
                    {.size = kLabelSize, .fill = curve.colour.label, .weight = "500"});
  }
  return out;
}

/// Draws the legend from `top` on; returns the height it took.
int draw_legend(std::string& out, const PlotOptions& options, const std::vector<Curve>& curves, double top) {
  if (!options.legend || curves.size() < 2) return 0;
  double x = kEdge;
  int row = 0;
  for (const Curve& curve : curves) {
    const std::string name = fit_text(curve.series->name, kLabelSize, kMaxNameWidth);
    const double width = 26 + text_width(name, kLabelSize) + 16;
    if (x > kEdge && x + width > options.width - kEdge) {
      x = kEdge;
      ++row;
    }
    const double y = top + row * kLegendRow;
    if (curve.series->mark == Mark::points)
      out += marker(x + 10, y, curve, name);
    else
      out += fmt::format("<path d=\"M{:.1f} {:.1f}h20\" stroke=\"{}\" stroke-width=\"2.5\" {}/>\n", x, y,
                         curve.colour.line, curve.dashed ? "stroke-dasharray=\"6 4\"" : "");
    out += svg_text(x + 26, y + 4, name, {.size = kLabelSize, .fill = kInk});
    x += width;
  }
  return (row + 1) * kLegendRow + 4;
}

double widest(const std::vector<Tick>& ticks) {
  double width = 0;
  for (const Tick& tick : ticks) width = std::max(width, text_width(tick.label, kTickSize));
  return width;
}

}  // namespace

std::vector<double> smooth(const std::vector<double>& y, double weight) {
  std::vector<double> out = y;
  double average = 0, left = 1;  // `left`: weight^(values so far), the share of the zero start
  for (double& value : out) {
    if (!std::isfinite(value)) continue;
    average = weight * average + (1 - weight) * value;
    left *= weight;
    value = average / (1 - left);
  }
  return out;
}

std::string svg_plot(const PlotOptions& options, const std::vector<Series>& series) {
  std::vector<Curve> curves = curves_of(series);
  Frame frame;
  fit(frame, options, curves);
  find_ends(frame, curves);
  double top = svg_heading_height(options.title, options.subtitle);
  std::string legend;
  const int legend_height = draw_legend(legend, options, curves, top + 10);
  const int height = options.height + std::max(0, legend_height - (kLegendRow + 4));  // further rows of the legend
  top += legend_height;
  frame.top = top + (options.y.label.empty() ? 8 : 28);
  frame.bottom = height - kBottom;
  const std::vector<Tick> y_ticks = ticks(frame.y, static_cast<int>((frame.bottom - frame.top) / kTickEvery));
  frame.left = kEdge + widest(y_ticks) + 8;
  frame.right = options.width - kEdge - 8;
  const double label_width = labels_width(frame, options, curves);
  frame.right -= label_width;
  const std::vector<Tick> x_ticks = ticks(frame.x, static_cast<int>((frame.right - frame.left) / kXTickEvery));
  return svg_begin(options.width, height, options.title, options.subtitle) + legend +
         draw_axes(frame, options, x_ticks, y_ticks) + draw_no_data(frame, curves) +
         draw_curves(frame, options, curves) + (label_width > 0 ? draw_end_labels(frame, options, curves) : "") +
         "</svg>\n";
}

}  // namespace kiln

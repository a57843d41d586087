#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace kiln {

/// For text and attributes of XML and HTML: & < > " ' are escaped, control characters become spaces.
std::string escape_xml(std::string_view text);

/// Approximate width in pixels of text in a sans-serif font of `size` pixels.
double text_width(std::string_view text, double size);

/// The text itself, or as much of it as fits in `width` pixels with an ellipsis; never cuts a UTF-8 character.
std::string fit_text(std::string_view text, double size, double width);

/// A colour of a line and, darker, of its label. After Okabe & Ito 2008 ("Color universal design"), without the yellow,
/// which vanishes on white. Indices wrap.
struct Colour {
  std::string_view line, label;
};
Colour palette(std::size_t index);

/// The palette wraps after this many; later series differ by their dashes.
inline constexpr std::size_t kPaletteSize = 7;

inline constexpr std::string_view kFontFamily =
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
inline constexpr std::string_view kInk = "#1f2328", kMutedInk = "#59636e", kGridInk = "#e6e8eb", kAxisInk = "#9aa3ad";

/// The start of a figure: the root element with its white background, title and subtitle ("" leaves them out).
std::string svg_begin(int width, int height, std::string_view title, std::string_view subtitle);
/// Height taken by the title and subtitle, in pixels.
double svg_heading_height(std::string_view title, std::string_view subtitle);

struct TextStyle {
  double size = 12;
  std::string_view fill = kMutedInk;
  std::string_view anchor = "start";  // start | middle | end
  std::string_view weight = "400";
};
/// One text element with its baseline at (x, y).
std::string svg_text(double x, double y, std::string_view text, const TextStyle& style);
/// One straight line.
std::string svg_line(double x1, double y1, double x2, double y2, std::string_view stroke, double width);

}  // namespace kiln

#include "report/svg.h"

#include <fmt/format.h>

#include <array>

namespace kiln {
namespace {

constexpr std::array<Colour, kPaletteSize> kPalette{{{"#0072b2", "#005c91"},
                                                     {"#d55e00", "#b04e00"},
                                                     {"#009e73", "#007556"},
                                                     {"#cc79a7", "#a3487c"},
                                                     {"#e69f00", "#8f6300"},
                                                     {"#56b4e9", "#1f7cb0"},
                                                     {"#444444", "#444444"}}};
constexpr double kTitleSize = 15, kSubtitleSize = 12;
constexpr std::string_view kEllipsis = "…";

/// Width of a character as a share of the font size, as in common sans-serif fonts.
double advance(char c) {
  if ((c & 0xC0) == 0x80) return 0;  // continuation of a UTF-8 character
  if (std::string_view("iljftI.,:;|!'()[] -").find(c) != std::string_view::npos) return 0.34;
  if (std::string_view("mwMW%@").find(c) != std::string_view::npos) return 0.88;
  if (c >= 'A' && c <= 'Z') return 0.7;
  return 0.6;
}

}  // namespace

std::string escape_xml(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t' ? ' ' : c;
    }
  }
  return out;
}

double text_width(std::string_view text, double size) {
  double width = 0;
  for (const char c : text) width += advance(c);
  return width * size;
}

std::string fit_text(std::string_view text, double size, double width) {
  if (text_width(text, size) <= width) return std::string(text);
  double used = text_width(kEllipsis, size);
  std::size_t end = 0;
  while (end < text.size() && used + advance(text[end]) * size <= width) used += advance(text[end++]) * size;
  while (end > 0 && (text[end] & 0xC0) == 0x80) --end;
  return std::string(text.substr(0, end)).append(kEllipsis);
}

Colour palette(std::size_t index) { return kPalette[index % kPalette.size()]; }

double svg_heading_height(std::string_view title, std::string_view subtitle) {
  return 14 + (title.empty() ? 0 : 18) + (subtitle.empty() ? 0 : 18);
}

std::string svg_begin(int width, int height, std::string_view title, std::string_view subtitle) {
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" role=\"img\" "
      "aria-label=\"{2}\" font-family=\"{3}\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n",
      width, height, escape_xml(title), kFontFamily);
  double y = 28;
  if (!title.empty()) {
    out += svg_text(16, y, title, {.size = kTitleSize, .fill = kInk, .weight = "600"});
    y += 18;
  }
  if (!subtitle.empty()) out += svg_text(16, y, subtitle, {.size = kSubtitleSize});
  return out;
}

std::string svg_text(double x, double y, std::string_view text, const TextStyle& style) {
  return fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\" font-weight=\"{}\">{}</text>\n",
      x, y, style.size, style.fill, style.anchor, style.weight, escape_xml(text));
}

std::string svg_line(double x1, double y1, double x2, double y2, std::string_view stroke, double width) {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\" stroke-width=\"{}\"/>\n", x1, y1, x2,
      y2, stroke, width);
}

}  // namespace kiln

#include "report/plot.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <regex>
#include <sstream>

#include "base/error.h"
#include "catch.h"
#include "report/svg.h"

using namespace kiln;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

/// Every element is closed in order, attributes are quoted, and no NaN or infinity is drawn.
void check_well_formed(const std::string& svg) {
  std::vector<std::string> open;
  const std::regex tag(R"re(<(/?)([a-z]+)((?: [a-zA-Z0-9:-]+="[^"<]*")* *)(/?)>)re");
  std::size_t matched = 0;
  for (std::sregex_iterator at(svg.begin(), svg.end(), tag), end; at != end; ++at, ++matched) {
    const std::smatch& m = *at;
    if (m[1].length() > 0) {
      REQUIRE_FALSE(open.empty());
      CHECK(open.back() == m[2].str());
      open.pop_back();
    } else if (m[4].length() == 0) {
      open.push_back(m[2].str());
    }
  }
  CHECK(open.empty());
  CHECK(matched == count(svg, "<"));
  CHECK(svg.find("nan") == std::string::npos);
  CHECK(svg.find("inf") == std::string::npos);
}

Series wave(const std::string& name, std::size_t n) {
  Series series{.name = name};
  for (std::size_t i = 0; i < n; ++i) {
    series.x.push_back(static_cast<double>(i));
    series.y.push_back(3 + std::sin(static_cast<double>(i)));
  }
  return series;
}

/// Baselines of the end labels: the texts right of the plot area, by their weight.
std::vector<double> label_rows(const std::string& svg) {
  std::vector<double> rows;
  const std::regex text(R"re(<text x="[0-9.]+" y="([0-9.]+)"[^>]*font-weight="500")re");
  for (std::sregex_iterator at(svg.begin(), svg.end(), text), end; at != end; ++at) rows.push_back(std::stod((*at)[1]));
  return rows;
}

}  // namespace

TEST_CASE("smooth: exponential average without the bias of its start") {
  CHECK(smooth({2, 2, 2}, 0.9)[2] == Approx(2));
  const auto s = smooth({1, 3, kNan, 5}, 0.5);
  CHECK(s[0] == Approx(1));
  CHECK(s[1] == Approx((0.5 * 1 + 3) / 1.5));
  CHECK(std::isnan(s[2]));
  CHECK(s[3] == Approx((0.25 * 1 + 0.5 * 3 + 5) / 1.75));
}

TEST_CASE("plot: well-formed whatever the data") {
  const Scale scale = GENERATE(Scale::linear, Scale::log);
  const PlotOptions options{.title = "a < b & \"c\"",
                            .subtitle = "s",
                            .x = {.label = "Tokens", .scale = scale},
                            .y = {.label = "Loss <nats>", .scale = scale}};
  Series gaps{.name = "g<1>", .x = {1, 2, 3, 4, 5}, .y = {1, kNan, HUGE_VAL, -1, 0}, .smoothing = 0.5};
  check_well_formed(svg_plot(options, {gaps}));
  check_well_formed(svg_plot(options, {}));
  check_well_formed(svg_plot(options, {Series{.name = "empty"}, Series{.name = "one", .x = {1}, .y = {1}}}));
  check_well_formed(svg_plot(options, {wave("a", 50), {.name = "p", .x = {3}, .y = {2}, .mark = Mark::points}}));
  check_well_formed(svg_plot(options, {{.name = "huge", .x = {1, 2}, .y = {1e-300, 1e300}}}));
  CHECK_THAT(svg_plot(options, {}), ContainsSubstring("no data"));
  CHECK_THAT(svg_plot(options, {}), ContainsSubstring("a &lt; b &amp; &quot;c&quot;"));
}

TEST_CASE("plot: explicit white background, title, labels, legend and end labels") {
  const std::string svg =
      svg_plot({.title = "T", .x = {.label = "Tokens"}, .y = {.label = "Loss"}}, {wave("alpha", 10), wave("beta", 10)});
  for (const char* part : {"fill=\"#ffffff\"", ">T<", ">Tokens<", ">Loss<", ">alpha<", ">beta<", ">alpha  3.412<"})
    CHECK_THAT(svg, ContainsSubstring(part));
  const std::string single = svg_plot({.title = "T"}, {wave("alpha", 10)});
  CHECK(single.find(">alpha<") == std::string::npos);
  CHECK_THAT(single, ContainsSubstring(">3.412<"));
}

TEST_CASE("plot: end labels do not overlap, and too many are left out") {
  std::vector<Series> series;
  for (int i = 0; i < 12; ++i) series.push_back({.name = "run", .x = {0, 1}, .y = {1, 2 + 1e-6 * i}});
  std::vector<double> rows = label_rows(svg_plot({.title = "T"}, series));
  REQUIRE(rows.size() == 12);
  std::sort(rows.begin(), rows.end());
  for (std::size_t i = 1; i < rows.size(); ++i) CHECK(rows[i] - rows[i - 1] >= 14.8);
  for (int i = 0; i < 60; ++i) series.push_back(series.front());
  CHECK(label_rows(svg_plot({.title = "T"}, series)).empty());
}

TEST_CASE("plot: a long run does not make a long file, and keeps its spikes") {
  Series series = wave("long", 200000);
  series.y[77777] = 50;
  const std::string svg = svg_plot({.title = "T", .y = {.max = 50}}, {series});
  CHECK(svg.size() < 100000);
  const std::size_t start = svg.find("<path d=\"M") + 9;
  std::istringstream data(svg.substr(start, svg.find('"', start) - start));
  double highest = 1e9, before = -1, x = 0, y = 0;
  for (char command = 0; data >> command >> x >> y;) {
    CHECK(x >= before);
    before = x;
    highest = std::min(highest, y);
  }
  CHECK(data.eof());
  const std::size_t clip = svg.find("y=\"", svg.find("<svg x=")) + 3;
  CHECK(highest == Approx(std::stod(svg.substr(clip))).margin(0.11));
}

TEST_CASE("plot: the raw curve stays behind the smoothed one, and a gap breaks the line") {
  Series series{.name = "a", .x = {0, 1, 2, 3}, .y = {1, 2, kNan, 4}, .smoothing = 0.9};
  const std::string svg = svg_plot({.title = "T"}, {series});
  CHECK(count(svg, "stroke-opacity=\"0.25\"") == 1);
  CHECK(svg.find("stroke-opacity=\"0.25\"") < svg.find("stroke-width=\"2\""));
  std::smatch m;
  REQUIRE(std::regex_search(svg, m, std::regex(R"re(<path d="([^"]*)"[^>]*stroke-opacity="0.25")re")));
  CHECK(count(m[1], "M") == 2);
}

TEST_CASE("plot: x and y of different lengths are an error") {
  CHECK_THROWS_AS(svg_plot({}, {{.name = "a", .x = {1, 2}, .y = {1}}}), Error);
}

TEST_CASE("bars: totals, parts and the limit are drawn to scale") {
  constexpr double kGiB = 1 << 30;
  const std::string svg =
      svg_bars({.title = "B", .parts = {"weights", "states"}, .limit = 4 * kGiB, .limit_label = "4 GiB"},
               {{"adamw", {kGiB, 2 * kGiB}}, {"fira & co", {kGiB, 0}}});
  check_well_formed(svg);
  for (const char* part :
       {">3.00 GiB<", ">1.00 GiB<", "fira &amp; co", ">weights<", "adamw, states: 2.00 GiB", ">4 GiB<"})
    CHECK_THAT(svg, ContainsSubstring(part));
  std::vector<double> widths;
  const std::regex bar(R"re(width="([0-9.]+)" height="18")re");
  for (std::sregex_iterator at(svg.begin(), svg.end(), bar), end; at != end; ++at)
    widths.push_back(std::stod((*at)[1]));
  REQUIRE(widths.size() == 4);
  CHECK(widths[1] == Approx(2 * widths[0]).margin(0.2));
  CHECK(widths[2] == Approx(widths[0]).margin(0.2));
  check_well_formed(svg_bars({.title = "none"}, {}));
  CHECK_THROWS_AS(svg_bars({}, {{"a", {-1}}}), Error);
  CHECK_THROWS_AS(svg_bars({}, {{"a", {}}}), Error);
}

TEST_CASE("svg: text is escaped and cut between characters") {
  CHECK(escape_xml("<a b=\"c\">'&\x01") == "&lt;a b=&quot;c&quot;&gt;&#39;&amp; ");
  CHECK(fit_text("short", 12, 100) == "short");
  const std::string cut = fit_text("ééééééééééééééééééé", 12, 60);
  CHECK(cut.ends_with("…"));
  CHECK(cut.size() % 2 == 1);  // whole two-byte characters, then the three bytes of the ellipsis
  CHECK(text_width(cut, 12) <= 60);
}

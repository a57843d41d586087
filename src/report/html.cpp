#include "report/html.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string_view>

#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "report/plot.h"
#include "report/prediction_section.h"
#include "report/svg.h"

namespace kiln {
namespace {

constexpr std::size_t kFinalSteps = 20;   // of the mean that the table calls the final training loss
constexpr double kSmoothingShare = 0.01;  // of a run's steps: the span of the exponential average
constexpr double kWarmUpShare = 0.1;      // of a run, whose loss may lie above the plot
constexpr std::string_view kDash = "–";

constexpr std::string_view kStyle = R"(
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --page: #ffffff; --line: #d9dde2;
  --panel: #f6f8fa; --best: #00704f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9da7b1; --page: #0d1117; --line: #30363d;
    --panel: #161b22; --best: #4cc9a0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1280px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 0 0 12px; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 13px; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
td.best { color: var(--best); font-weight: 600; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 540px), 1fr)); gap: 16px; }
figure { margin: 0; align-self: start; border: 1px solid var(--line);
  border-radius: 8px; overflow: hidden; background: #ffffff; }
figure svg { display: block; width: 100%; height: auto; }
input[type=radio] { position: absolute; opacity: 0; }
label { display: inline-block; padding: 4px 14px; border: 1px solid var(--line); cursor: pointer;
  color: var(--muted); font-size: 13px; }
label.first { border-radius: 6px 0 0 6px; border-right: 0; }
label.second { border-radius: 0 6px 6px 0; }
#by-tokens:checked ~ label[for=by-tokens], #by-time:checked ~ label[for=by-time] {
  background: var(--panel); color: var(--ink); font-weight: 600; }
#by-tokens:focus-visible ~ label[for=by-tokens],
#by-time:focus-visible ~ label[for=by-time] { outline: 2px solid #0072b2; }
#by-tokens:checked ~ .time, #by-time:checked ~ .tokens { display: none; }
.figures { margin-top: 12px; }
details { border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px; background: var(--panel); }
summary { padding: 8px 14px; cursor: pointer; font-weight: 500; }
pre { margin: 0; padding: 4px 14px 14px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
)";

/// Names apart: runs of one name show their directories.
void tell_apart(std::vector<RunData>& runs) {
  std::vector<std::string> names;
  for (const RunData& run : runs) names.push_back(run.name);
  for (RunData& run : runs)
    if (std::count(names.begin(), names.end(), run.name) > 1) run.name += " (" + run.dir.string() + ")";
}

/// One column of the table of runs.
struct Column {
  std::string_view heading;
  std::function<std::optional<double>(const RunData&)> value;
  std::function<std::string(double)> show;
  bool least_is_best = false;
};

std::vector<Column> columns() {
  const auto loss = [](double v) { return fmt::format("{:.4f}", v); };
  const auto bytes = [](double v) { return human_bytes(static_cast<std::uint64_t>(v)); };
  const auto count = [](double v) { return human_count(v); };
  const auto last_of = [](auto member) {
    return [member](const RunData& run) {
      return run.metrics.empty() ? std::nullopt
                                 : std::optional<double>(static_cast<double>(run.metrics.back().*member));
    };
  };
  const auto memory = [](const RunData& run) {
    const std::uint64_t peak = peak_memory_bytes(run);
    return peak > 0 ? std::optional<double>(static_cast<double>(peak)) : std::nullopt;
  };
  return {{"Parameters", [](const RunData& run) { return run.parameters; }, count},
          {"Steps", last_of(&StepMetrics::step), [](double v) { return fmt::format("{:.0f}", v); }},
          {"Tokens", last_of(&StepMetrics::tokens), count},
          {"Training loss¹", [](const RunData& run) { return final_train_loss(run, kFinalSteps); }, loss, true},
          {"Validation loss", [](const RunData& run) { return run.final_valid_loss; }, loss, true},
          {"Last checkpoint²", [](const RunData& run) { return run.last_valid_loss; }, loss, true},
          {"Merged²", [](const RunData& run) { return run.merged_valid_loss; }, loss, true},
          {"Optimizer state", [](const RunData& run) { return run.state_bytes; }, bytes, true},
          {"Tokens/s", [](const RunData& run) { return run.tokens_per_s; }, count},
          {"Peak memory", memory, bytes, true}};
}

/// The table; a column that no run has a value for is left out.
std::string table(const std::vector<RunData>& runs) {
  std::vector<Column> shown;
  for (Column& column : columns())
    if (std::any_of(runs.begin(), runs.end(), [&](const RunData& run) { return column.value(run).has_value(); }))
      shown.push_back(std::move(column));
  std::string out = "<div class=\"scroll\"><table>\n<tr><th class=\"text\">Run</th><th class=\"text\">Optimizer</th>";
  for (const Column& column : shown) out += fmt::format("<th>{}</th>", column.heading);
  out += "</tr>\n";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    out += fmt::format(
        "<tr><td class=\"text\"><span class=\"dot\" style=\"background:{}\"></span>{}</td><td class=\"text\">{}</td>",
        palette(i).line, escape_xml(runs[i].name),
        runs[i].optimizer.empty() ? std::string(kDash) : escape_xml(runs[i].optimizer));
    for (const Column& column : shown) {
      const std::optional<double> value = column.value(runs[i]);
      const bool known = value && std::isfinite(*value);
      const bool best = known && column.least_is_best && runs.size() > 1 &&
                        std::all_of(runs.begin(), runs.end(), [&](const RunData& other) {
                          return !(column.value(other).value_or(*value) < *value);
                        });
      out +=
          fmt::format("<td{}>{}</td>", best ? " class=\"best\"" : "", known ? column.show(*value) : std::string(kDash));
    }
    out += "</tr>\n";
  }
  return out + "</table></div>\n";
}

/// What the x axis of a group of figures shows.
struct Clock {
  std::string label{};
  std::vector<std::vector<double>> x{};  // by run, one for each step
};

Clock token_clock(const std::vector<RunData>& runs) {
  Clock clock{.label = "Tokens"};
  for (const RunData& run : runs) {
    std::vector<double>& x = clock.x.emplace_back();
    for (const StepMetrics& m : run.metrics) x.push_back(static_cast<double>(m.tokens));
  }
  return clock;
}

Clock time_clock(const std::vector<RunData>& runs) {
  Clock clock{.label = "Training time (s)"};
  double longest = 0;
  for (const RunData& run : runs) {
    clock.x.push_back(elapsed_seconds(run));
    if (!clock.x.back().empty()) longest = std::max(longest, clock.x.back().back());
  }
  const double unit = longest > 3 * 3600 ? 3600 : longest > 180 ? 60 : 1;
  if (unit > 1) clock.label = unit > 60 ? "Training time (hours)" : "Training time (minutes)";
  for (std::vector<double>& x : clock.x)
    for (double& value : x) value /= unit;
  return clock;
}

using Field = std::function<std::optional<double>(const StepMetrics&)>;

/// One series a run, of the steps that have the value.
std::vector<Series> series_of(const std::vector<RunData>& runs, const Clock& clock, bool smoothed, const Field& field) {
  std::vector<Series> all;
  for (std::size_t r = 0; r < runs.size(); ++r) {
    Series series{.name = runs[r].name, .colour = r};
    for (std::size_t i = 0; i < runs[r].metrics.size(); ++i) {
      const std::optional<double> value = field(runs[r].metrics[i]);
      if (!value) continue;
      series.x.push_back(clock.x[r][i]);
      series.y.push_back(*value);
    }
    const double span = kSmoothingShare * static_cast<double>(series.y.size());
    if (smoothed && span > 1) series.smoothing = 1 - 1 / span;
    if (!series.y.empty()) all.push_back(std::move(series));
  }
  return all;
}

/// An upper limit that leaves out the steep beginning, so that the differences between runs can be seen.
std::optional<double> limit_without_start(const std::vector<Series>& all) {
  double high = -HUGE_VAL;
  for (const Series& series : all)
    for (std::size_t i = 0; i < series.x.size(); ++i)
      if (series.x[i] >= kWarmUpShare * series.x.back() && std::isfinite(series.y[i]))
        high = std::max(high, series.y[i]);
  return std::isfinite(high) ? std::optional<double>(high) : std::nullopt;
}

void add_merged(std::vector<Series>& all, const std::vector<RunData>& runs, const Clock& clock) {
  for (std::size_t r = 0; r < runs.size(); ++r) {
    if (!runs[r].merged_valid_loss || clock.x[r].empty()) continue;
    all.push_back({.name = runs[r].name + ", merged",
                   .x = {clock.x[r].back()},
                   .y = {*runs[r].merged_valid_loss},
                   .mark = Mark::points,
                   .colour = r});
  }
}

/// Losses of the averages that runs kept while they trained; a series for each window.
void add_averages(std::vector<Series>& all, const std::vector<RunData>& runs, const Clock& clock) {
  for (std::size_t r = 0; r < runs.size(); ++r) {
    std::map<std::string, Series> by_window;
    for (std::size_t i = 0; i < runs[r].metrics.size(); ++i)
      for (const AverageLoss& average : runs[r].metrics[i].average_loss) {
        Series& series = by_window[average.window];
        series.x.push_back(clock.x[r][i]);
        series.y.push_back(average.loss);
      }
    for (auto& [window, series] : by_window) {
      series.name = fmt::format("{}, average {}", runs[r].name, window);
      series.mark = Mark::points;
      series.colour = runs.size() + all.size();
      all.push_back(std::move(series));
    }
  }
}

/// Where runs went on after a divergence; a series of points for each such run, on its training loss.
void add_rescues(std::vector<Series>& all, const std::vector<RunData>& runs, const Clock& clock) {
  for (std::size_t r = 0; r < runs.size(); ++r) {
    Series series{.name = runs[r].name + ", rescue", .mark = Mark::points, .colour = runs.size() + r};
    for (std::size_t i = 0; i < runs[r].metrics.size(); ++i) {
      if (!runs[r].metrics[i].rescue) continue;
      series.x.push_back(clock.x[r][i]);
      series.y.push_back(runs[r].metrics[i].loss);
    }
    if (!series.x.empty()) all.push_back(std::move(series));
  }
}

/// What happened at each of those points; nothing where no run was rescued.
std::string rescue_list(const std::vector<RunData>& runs) {
  std::string items;
  for (const RunData& run : runs)
    for (const StepMetrics& m : run.metrics)
      if (m.rescue) items += fmt::format("<li>{}: {}</li>\n", escape_xml(run.name), escape_xml(to_string(*m.rescue)));
  if (items.empty()) return "";
  return "<h2>Rescues</h2>\n<p>Runs that diverged and went on from the mean of their last checkpoints. The steps that "
         "were dropped are not in the curves.</p>\n<ul>\n" +
         items + "</ul>\n";
}

std::string figure(const std::string& svg) { return "<figure>" + svg + "</figure>\n"; }

/// Optimizer bytes of the runs that tell them; nothing when fewer than two do.
std::string state_figure(const std::vector<RunData>& runs) {
  std::vector<Bar> bars;
  for (std::size_t r = 0; r < runs.size(); ++r)
    if (runs[r].state_bytes) bars.push_back({.name = runs[r].name, .parts = {*runs[r].state_bytes}, .colour = r});
  if (bars.size() < 2) return "";
  return figure(svg_bars({.title = "Optimizer state", .width = 640}, bars));
}

std::string figures(const std::vector<RunData>& runs, const Clock& clock) {
  const Axis x{.label = clock.label, .include_zero = true};
  const auto options = [&](const char* title, const Axis& y) {
    return PlotOptions{.title = title, .x = x, .y = y, .width = 640, .height = 380};
  };
  std::string out;
  std::vector<Series> loss = series_of(runs, clock, true, [](const StepMetrics& m) { return m.loss; });
  const std::optional<double> loss_limit = limit_without_start(loss);
  add_rescues(loss, runs, clock);
  out += figure(svg_plot(options("Training loss", {.label = "Loss (nats per token)", .max = loss_limit}), loss));
  std::vector<Series> valid = series_of(runs, clock, false, [](const StepMetrics& m) { return m.valid_loss; });
  const std::optional<double> limit = limit_without_start(valid);
  add_merged(valid, runs, clock);
  add_averages(valid, runs, clock);
  if (!valid.empty())
    out += figure(svg_plot(options("Validation loss", {.label = "Loss (nats per token)", .max = limit}), valid));
  out += figure(svg_plot(options("Learning rate", {.label = "Learning rate", .include_zero = true}),
                         series_of(runs, clock, false, [](const StepMetrics& m) { return m.lr; })));
  out += figure(svg_plot(options("Gradient norm", {.label = "L2 norm before clipping", .scale = Scale::log}),
                         series_of(runs, clock, true, [](const StepMetrics& m) { return m.grad_norm; })));
  out += figure(svg_plot(options("Speed", {.label = "Tokens per second", .include_zero = true}),
                         series_of(runs, clock, true, [](const StepMetrics& m) { return m.tokens_per_s; })));
  return out + state_figure(runs);
}

std::string notes(const std::vector<RunData>& runs) {
  std::string out = fmt::format("¹ Mean of the last {} steps. ", kFinalSteps);
  if (std::any_of(runs.begin(), runs.end(),
                  [](const RunData& run) { return run.merged_valid_loss || run.last_valid_loss; }))
    out += "² Validation loss of the last checkpoint, and of the merged snapshots. ";
  if (runs.size() > 1) out += "The best of a column is green.";
  return "<p style=\"margin-top:8px;font-size:13px\">" + out + "</p>\n";
}

}  // namespace

std::string html_report(const std::string& title, std::vector<RunData> runs) {
  tell_apart(runs);
  std::string out = fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, "
      "initial-scale=1\">\n<title>{0}</title>\n<style>{1}</style>\n"
      "</head>\n<body>\n<h1>{0}</h1>\n<p>{2} run{3}</p>\n",
      escape_xml(title), kStyle, runs.size(), runs.size() == 1 ? "" : "s");
  out += table(runs) + notes(runs);
  out +=
      "<h2>Curves</h2>\n<p>Strong lines are exponential averages where the faint raw values lie behind them; the "
      "steep start of a loss may lie above its plot.</p>\n<div>\n"
      "<input type=\"radio\" name=\"clock\" id=\"by-tokens\" checked><label class=\"first\" for=\"by-tokens\">by tokens"
      "</label><input type=\"radio\" name=\"clock\" id=\"by-time\"><label class=\"second\" for=\"by-time\">by "
      "time</label>\n";
  out += "<div class=\"figures tokens\">\n" + figures(runs, token_clock(runs)) + "</div>\n";
  out += "<div class=\"figures time\">\n" + figures(runs, time_clock(runs)) + "</div>\n</div>\n";
  out += rescue_list(runs) + prediction_section(runs);
  out += "<h2>Configurations</h2>\n";
  for (const RunData& run : runs)
    out += fmt::format("<details><summary>{}</summary><pre>{}</pre></details>\n", escape_xml(run.name),
                       run.config.empty() ? "no config.yaml in the run directory" : escape_xml(run.config));
  return out + "</body>\n</html>\n";
}

void write_report(const std::vector<std::filesystem::path>& dirs, const std::filesystem::path& out,
                  const std::string& title) {
  check(!dirs.empty(), "kiln report: no run directory given; name one or more, such as runs/fira60m");
  std::vector<RunData> runs;
  for (const std::filesystem::path& dir : dirs) runs.push_back(load_run(dir));
  write_text_atomic(out, html_report(title, std::move(runs)));
}

}  // namespace kiln

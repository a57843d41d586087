#include "report/metrics.h"

#include <cmath>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "report/fixed_text.h"

namespace kiln {
namespace {

constexpr std::size_t kMaxLineBytes = 4096;  // ten numbers of at most 24 characters and 16 averages, and their keys
constexpr std::size_t kMaxShownBytes = 60;
constexpr std::size_t kMaxReasonBytes = 400;  // of a rescue, whose reason may hold a long path

/// Reads one field of a line's object; `fault` gets a description when the key is missing or of the wrong type.
struct FieldReader {
  const Json& object;
  std::string fault{};

  const Json* find(const char* key, const char* expected) {
    const auto found = object.find(key);
    if (found != object.end()) return &*found;
    if (fault.empty()) fault = fmt::format("key \"{}\" is missing, expected {}", key, expected);
    return nullptr;
  }
  void wrong(const char* key, const Json& value, const char* expected) {
    if (fault.empty()) fault = fmt::format("key \"{}\" is {}, expected {}", key, value.dump(), expected);
  }
  void operator()(const char* key, double& out) {
    const Json* value = find(key, "a number or null");
    if (value == nullptr) return;
    if (value->is_null())
      out = std::numeric_limits<double>::quiet_NaN();
    else if (value->is_number())
      out = value->get<double>();
    else
      wrong(key, *value, "a number or null");
  }
  void operator()(const char* key, std::optional<double>& out) {
    if (object.contains(key)) (*this)(key, out.emplace());
  }
  void operator()(const char* key, std::vector<AverageLoss>& out) {
    const auto found = object.find(key);
    if (found == object.end()) return;
    if (!found->is_object()) return wrong(key, *found, "an object of losses");
    for (const auto& [name, value] : found->items()) {
      if (!value.is_number() && !value.is_null()) return wrong(key, *found, "an object of losses");
      out.push_back({name, value.is_null() ? std::numeric_limits<double>::quiet_NaN() : value.template get<double>()});
    }
  }
  void operator()(const char* key, std::optional<RescueEvent>& out) {
    const auto found = object.find(key);
    if (found == object.end()) return;
    try {
      out = rescue_event(*found);
    } catch (const nlohmann::json::exception&) {
      wrong(key, *found,
            "an object with number, step, resumed_step, oldest_step, checkpoints, optimizer_states, reason");
    }
  }
  template <typename Integer>
  requires std::is_integral_v<Integer>
  void operator()(const char* key, Integer& out) {
    const Json* value = find(key, "an integer");
    if (value == nullptr) return;
    if (value->is_number_integer())
      out = value->get<Integer>();
    else
      wrong(key, *value, "an integer");
  }
};

/// One line as metrics, or what is wrong with it in `fault`.
StepMetrics parse_line(std::string_view line, std::string& fault) {
  StepMetrics metrics;
  const Json object = Json::parse(line, nullptr, false);
  if (!object.is_object()) {
    fault = fmt::format("found `{}{}`, expected one JSON object", line.substr(0, kMaxShownBytes),
                        line.size() > kMaxShownBytes ? "..." : "");
    return metrics;
  }
  FieldReader reader{object};
  visit_fields(metrics, [&](const char* key, auto& value) { reader(key, value); });
  fault = reader.fault;
  return metrics;
}

/// Calls `use(metrics, line)` for every whole line.
template <typename Use>
void for_each_line(const std::filesystem::path& path, std::string_view text, Use use) {
  for (std::size_t number = 1; !text.empty(); ++number) {
    const std::size_t end = text.find('\n');
    const bool ended = end != std::string_view::npos;
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(ended ? end + 1 : text.size());
    std::string fault;
    const StepMetrics metrics = parse_line(line, fault);
    if (fault.empty())
      use(metrics, line);
    else if (ended)  // a line without its newline was cut by a crash: the writer sends both in one call
      fail(ExitCode::data, "{}:{}: {}; delete the line or restore the file", path.string(), number, fault);
  }
}

/// As one line, of a length that fits.
std::string rescue_text(RescueEvent event) {
  if (event.reason.size() > kMaxReasonBytes) event.reason.resize(kMaxReasonBytes);
  return to_json(event).dump(-1, ' ', true, Json::error_handler_t::ignore);  // a character that was cut is left out
}

/// Leaves in the file what a run that stopped right after `resume_step` would have left.
std::filesystem::path prepare(const std::filesystem::path& run_dir, std::int64_t resume_step) {
  std::error_code error;
  std::filesystem::create_directories(run_dir, error);
  if (error)
    fail(ExitCode::data, "{}: the run directory cannot be made ({}); check the path and its permissions",
         run_dir.string(), error.message());
  const std::filesystem::path path = run_dir / "metrics.jsonl";
  if (!std::filesystem::exists(path)) return path;
  const std::string text = resume_step > 0 ? read_text(path) : std::string();
  std::string kept;
  for_each_line(path, text, [&](const StepMetrics& metrics, std::string_view line) {
    if (metrics.step <= resume_step) kept.append(line).append("\n");
  });
  if (resume_step == 0 || kept != text) write_text_atomic(path, kept);
  return path;
}

}  // namespace

Json to_json(const RescueEvent& event) {
  return {{"number", event.number},
          {"step", event.step},
          {"resumed_step", event.resumed_step},
          {"oldest_step", event.oldest_step},
          {"checkpoints", event.checkpoints},
          {"optimizer_states", event.optimizer_states},
          {"reason", event.reason}};
}

RescueEvent rescue_event(const Json& json) {
  return {.number = json.at("number"),
          .step = json.at("step"),
          .resumed_step = json.at("resumed_step"),
          .oldest_step = json.at("oldest_step"),
          .checkpoints = json.at("checkpoints"),
          .optimizer_states = json.at("optimizer_states"),
          .reason = json.at("reason")};
}

std::string to_string(const RescueEvent& event) {
  return fmt::format(
      "rescue {}, step {}: mean of {} checkpoint{}, steps {} to {}, optimizer states {}; went on after "
      "step {} ({})",
      event.number, event.step, event.checkpoints, event.checkpoints == 1 ? "" : "s", event.oldest_step,
      event.resumed_step, event.optimizer_states == "average" ? "averaged" : "of the newest", event.resumed_step,
      event.reason);
}

MetricsWriter::MetricsWriter(const std::filesystem::path& run_dir, std::int64_t resume_step)
    : file_(prepare(run_dir, resume_step), AppendFile::Open::append) {}

void MetricsWriter::write(const StepMetrics& metrics) {
  FixedText<kMaxLineBytes> line;
  const auto add_number = [&line](std::string_view key, double number) {
    if (std::isfinite(number))
      line.add("\"{}\": {}", key, number);
    else
      line.add("\"{}\": null", key);
  };
  visit_fields(metrics, [&](const char* key, const auto& value) {
    using Value = std::decay_t<decltype(value)>;
    double number = 0;
    if constexpr (std::is_integral_v<Value>) {
      line.add("{}\"{}\": {}", line.view().empty() ? "{" : ", ", key, value);
      return;
    } else if constexpr (std::is_same_v<Value, double>) {
      number = value;
    } else if constexpr (std::is_same_v<Value, std::vector<AverageLoss>>) {
      for (std::size_t i = 0; i < value.size(); ++i) {
        if (i == 0) line.add(", \"{}\": {{", key);
        if (i > 0) line.add_text(", ");
        add_number(value[i].window, value[i].loss);
      }
      if (!value.empty()) line.add_text("}");
      return;
    } else if constexpr (std::is_same_v<Value, std::optional<RescueEvent>>) {
      if (value) line.add(", \"{}\": {}", key, rescue_text(*value));
      return;
    } else {
      if (!value) return;
      number = *value;
    }
    line.add_text(", ");
    add_number(key, number);
  });
  line.add_text("}\n");
  file_.write(line.view());
}

std::vector<StepMetrics> read_metrics(const std::filesystem::path& path) {
  std::vector<StepMetrics> all;
  const std::string text = read_text(path);
  for_each_line(path, text, [&](const StepMetrics& metrics, std::string_view) { all.push_back(metrics); });
  return all;
}

}  // namespace kiln

#include "report/run_data.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"

namespace kiln {
namespace {

/// Reads optional keys of summary.json; null counts as absent.
struct SummaryReader {
  const std::filesystem::path& path;
  const Json& object;

  const Json* find(const char* key) const {
    const auto found = object.find(key);
    return found == object.end() || found->is_null() ? nullptr : &*found;
  }
  void number(const char* key, std::optional<double>& out) const {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_number())
      fail(ExitCode::data, "{}: key \"{}\" is {}, expected a number; correct or delete the file", path.string(), key,
           value->dump());
    out = value->get<double>();
  }
  void text(const char* key, std::string& out) const {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_string())
      fail(ExitCode::data, "{}: key \"{}\" is {}, expected a string; correct or delete the file", path.string(), key,
           value->dump());
    out = value->get<std::string>();
  }
};

void read_summary(RunData& run) {
  const std::filesystem::path path = run.dir / "summary.json";
  if (!std::filesystem::exists(path)) return;
  const Json object = read_json(path);
  if (!object.is_object())
    fail(ExitCode::data, "{}: found {}, expected one JSON object; correct or delete the file", path.string(),
         object.type_name());
  const SummaryReader reader{path, object};
  reader.text("name", run.name);
  reader.text("optimizer", run.optimizer);
  reader.number("final_valid_loss", run.final_valid_loss);
  reader.number("last_valid_loss", run.last_valid_loss);
  reader.number("merged_valid_loss", run.merged_valid_loss);
  reader.number("state_bytes", run.state_bytes);
  reader.number("tokens_per_s", run.tokens_per_s);
  reader.number("parameters", run.parameters);
}

/// `kind` of the top-level `optimizer` entry, in flow or block style. The configuration is only shown here, never
/// obeyed, so that a search of its text is enough.
std::string optimizer_in(std::string_view config) {
  std::size_t at = config.starts_with("optimizer:") ? 0 : config.find("\noptimizer:");
  if (at == std::string_view::npos) return "";
  at = config.find("optimizer:", at) + 10;
  std::size_t end = config.find('\n', at);  // the entry ends where a line begins without an indent
  while (end != std::string_view::npos && end + 1 < config.size() && (config[end + 1] == ' ' || config[end + 1] == '#'))
    end = config.find('\n', end + 1);
  const std::string_view entry = config.substr(at, end == std::string_view::npos ? end : end - at);
  std::size_t kind = entry.find("kind:");
  if (kind == std::string_view::npos) return "";
  kind = entry.find_first_not_of(" \"'", kind + 5);
  if (kind == std::string_view::npos) return "";
  const std::size_t stop = entry.find_first_of(" ,}\"'\n#", kind);
  return std::string(entry.substr(kind, stop == std::string_view::npos ? stop : stop - kind));
}

std::optional<double> median_speed(const std::vector<StepMetrics>& metrics) {
  std::vector<double> speeds;
  for (const StepMetrics& m : metrics)
    if (std::isfinite(m.tokens_per_s) && m.tokens_per_s > 0) speeds.push_back(m.tokens_per_s);
  if (speeds.empty()) return std::nullopt;
  const auto middle = speeds.begin() + static_cast<std::ptrdiff_t>(speeds.size() / 2);
  std::nth_element(speeds.begin(), middle, speeds.end());
  return *middle;
}

std::string directory_name(const std::filesystem::path& dir) {
  const std::filesystem::path clean = std::filesystem::absolute(dir).lexically_normal();
  return (clean.has_filename() ? clean : clean.parent_path()).filename().string();
}

void read_anneals(RunData& run) {
  if (!std::filesystem::is_directory(run.dir / "anneals")) return;
  for (const auto& entry : std::filesystem::directory_iterator(run.dir / "anneals"))
    if (std::filesystem::exists(entry.path() / "metrics.jsonl"))
      run.anneals.push_back({entry.path().filename().string(), read_metrics(entry.path() / "metrics.jsonl")});
  std::sort(run.anneals.begin(), run.anneals.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
}

}  // namespace

RunData load_run(const std::filesystem::path& dir) {
  const std::filesystem::path metrics = dir / "metrics.jsonl";
  if (!std::filesystem::exists(metrics))
    fail(ExitCode::data, "{}: no metrics.jsonl in it; name a run directory that `kiln train` wrote", dir.string());
  RunData run{.dir = dir, .name = directory_name(dir), .metrics = read_metrics(metrics)};
  if (std::filesystem::exists(dir / "config.yaml")) run.config = read_text(dir / "config.yaml");
  run.optimizer = optimizer_in(run.config);
  read_summary(run);
  if (std::filesystem::exists(dir / "prediction.json")) run.prediction = read_json(dir / "prediction.json");
  read_anneals(run);
  for (auto m = run.metrics.rbegin(); m != run.metrics.rend() && !run.final_valid_loss; ++m)
    run.final_valid_loss = m->valid_loss;
  if (!run.tokens_per_s) run.tokens_per_s = median_speed(run.metrics);
  return run;
}

std::optional<double> final_train_loss(const RunData& run, std::size_t count) {
  double sum = 0;
  std::size_t found = 0;
  for (auto m = run.metrics.rbegin(); m != run.metrics.rend() && found < count; ++m) {
    if (!std::isfinite(m->loss)) continue;
    sum += m->loss;
    ++found;
  }
  return found > 0 ? std::optional<double>(sum / static_cast<double>(found)) : std::nullopt;
}

std::uint64_t peak_memory_bytes(const RunData& run) {
  std::uint64_t peak = 0;
  for (const StepMetrics& m : run.metrics) peak = std::max(peak, m.memory_bytes);
  return peak;
}

std::vector<double> elapsed_seconds(const RunData& run) {
  std::vector<double> seconds;
  double sum = 0;
  for (const StepMetrics& m : run.metrics) {
    if (std::isfinite(m.step_ms)) sum += m.step_ms / 1000;
    seconds.push_back(sum);
  }
  return seconds;
}

}  // namespace kiln

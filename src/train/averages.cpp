#include "train/averages.h"

#include <algorithm>
#include <chrono>

#include "base/log.h"
#include "core/parallel.h"
#include "core/weighted_sum.h"
#include "io/safetensors.h"
#include "train/trainer.h"

namespace kiln {
namespace {

constexpr const char* kFile = "averages.safetensors";
constexpr std::int64_t kGrain = 1 << 14;  // elements of a thread

double weight_of(const AverageWindow& window) { return 1.0 / static_cast<double>(window.count); }

Json positions_json(const std::vector<RunPosition>& taken) {
  Json list = Json::array();
  for (const RunPosition& at : taken) list.push_back({at.step, at.tokens, at.position});
  return list;
}

std::vector<RunPosition> read_positions(const Json& list) {
  std::vector<RunPosition> taken;
  for (const Json& at : list) taken.push_back({.step = at.at(0), .tokens = at.at(1), .position = at.at(2)});
  return taken;
}

}  // namespace

Json provenance(const FinishedAverage& average) {
  Json json{{"method", "sma"}, {"dtype", "fp32"}, {"optimizer_state", "reset"}, {"window", average.name}};
  json["checkpoints"] = Json::array();
  const auto count = static_cast<double>(average.taken.size());
  for (std::size_t i = 0; i < average.taken.size(); ++i)
    json["checkpoints"].push_back({{"path", nullptr},
                                   {"step", average.taken[i].step},
                                   {"tokens", average.taken[i].tokens},
                                   {"weight", 1.0 / count},
                                   {"decay", i == 0 ? Json(nullptr) : Json((count - static_cast<double>(i)) / count)}});
  return json;
}

Averages::Averages(const Config& config, const DeviceWeights& weights, bool keeps_sums)
    : config_(config), weights_(weights), keeps_sums_(keeps_sums) {
  std::size_t elements = 0;
  for (const Parameter& parameter : weights.host().table().parameters) {
    offsets_.push_back(elements);
    elements += static_cast<std::size_t>(parameter.shape.numel());
  }
  bool evaluates = false;
  for (const AverageWindow& options : config.averages) {
    windows_.push_back({.options = options, .name = to_string(options), .taken = {}, .sums = {}});
    if (keeps_sums_) windows_.back().sums.resize(elements);
    evaluates = evaluates || options.evaluate;
  }
  if (keeps_sums_ || evaluates) scratch_ = std::make_unique<ModelWeights>(weights.config(), DType::f32);
  if (!keeps_sums_ || weights.shared()) return;
  copy_ = weights.backend().host_copy(weights.parts());
  worker_ = std::make_unique<Worker>();
}

Averages::~Averages() = default;

bool Averages::due(const Window& window, std::int64_t step) const {
  if (step % window.options.every != 0) return false;
  return window.options.start ? step >= *window.options.start : in_constant_phase(config_.schedule, step);
}

std::span<double> Averages::sums_of(Window& window, std::size_t parameter) const {
  const auto count = static_cast<std::size_t>(weights_.host().table().parameters[parameter].shape.numel());
  return std::span(window.sums).subspan(offsets_[parameter], count);
}

void Averages::add(Window& window, const ModelWeights& weights, bool first) const {
  for (std::size_t p = 0; p < offsets_.size(); ++p) {
    const std::span<double> sums = sums_of(window, p);
    const std::span<const float> values = weights.view(weights.table().parameters[p]).span<float>();
    parallel_for(static_cast<std::int64_t>(sums.size()), kGrain, [&](std::int64_t begin, std::int64_t end) {
      const auto from = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
      const std::span<double> part = sums.subspan(from, count);
      if (first) std::ranges::fill(part, 0.0);
      add_weighted(std::as_bytes(values.subspan(from, count)), DType::f32, weight_of(window.options), part);
    });
  }
}

std::optional<double> Averages::take(const RunPosition& at) {
  struct Due {
    Window* window;
    bool first;
  };
  std::vector<Due> all;
  for (Window& window : windows_) {
    if (!due(window, at.step)) continue;
    check(static_cast<std::int64_t>(window.taken.size()) < window.options.count, "Averages::take: {} is full",
          window.name);
    if (!window.taken.empty() && window.taken.back().step + window.options.every != at.step) window.taken.clear();
    window.taken.push_back(at);
    all.push_back({&window, window.taken.size() == 1});
  }
  if (all.empty()) return std::nullopt;
  if (!keeps_sums_) return 0.0;
  const auto begin = std::chrono::steady_clock::now();
  if (copy_) {
    worker_->wait();  // the copy before has been added up
    copy_->start();
    worker_->post([this, all] {
      weights_.unpack(copy_->wait(), *scratch_);
      for (const Due& one : all) add(*one.window, *scratch_, one.first);
    });
  } else {
    for (const Due& one : all) add(*one.window, weights_.host(), one.first);
  }
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<std::size_t> Averages::full() const {
  std::vector<std::size_t> list;
  for (std::size_t i = 0; i < windows_.size(); ++i)
    if (static_cast<std::int64_t>(windows_[i].taken.size()) == windows_[i].options.count) list.push_back(i);
  return list;
}

bool Averages::any_full() const {
  return std::ranges::any_of(
      windows_, [](const Window& w) { return static_cast<std::int64_t>(w.taken.size()) == w.options.count; });
}

FinishedAverage Averages::finish(std::size_t index) {
  if (worker_) worker_->wait();
  Window& window = windows_[index];
  FinishedAverage average{
      .name = window.name, .evaluate = window.options.evaluate, .taken = window.taken, .weights = scratch_.get()};
  window.taken.clear();
  for (std::size_t p = 0; keeps_sums_ && p < offsets_.size(); ++p) {
    const Parameter& parameter = scratch_->table().parameters[p];
    const std::span<float> mean = scratch_->view(parameter).span<float>();
    average.finite = round_sum(sums_of(window, p), DType::f32, std::as_writable_bytes(mean)) && average.finite;
  }
  return average;
}

void Averages::save(const std::filesystem::path& directory) {
  if (worker_) worker_->wait();
  Json under_way = Json::object();
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, std::span<const double>> sums;
  for (Window& window : windows_) {
    if (window.taken.empty()) continue;
    under_way[window.name] = positions_json(window.taken);
    for (std::size_t p = 0; p < offsets_.size(); ++p) {
      const Parameter& parameter = weights_.host().table().parameters[p];
      items.push_back({window.name + "." + parameter.name, DType::f64, parameter.shape.sizes()});
      sums[items.back().name] = sums_of(window, p);
    }
  }
  if (items.empty()) return;
  SafetensorsWriter out(directory / kFile, items, {{"format", "pt"}, {"windows", under_way.dump()}});
  for (const SafetensorsWriter::Item& item : out.layout()) out.append(std::as_bytes(sums.at(item.name)));
  out.finish();
}

void Averages::load(const std::filesystem::path& directory) {
  if (worker_) worker_->wait();
  for (Window& window : windows_) window.taken.clear();
  if (!std::filesystem::exists(directory / kFile)) return;
  const SafetensorsReader file(directory / kFile);
  const auto torn = [&](std::string_view what) {
    fail(ExitCode::data, "{}: {}; resume from another checkpoint, or delete the file to begin the averages anew",
         file.path().string(), what);
  };
  const auto text = file.metadata().find("windows");
  const Json under_way = text == file.metadata().end() ? Json() : Json::parse(text->second, nullptr, false);
  if (!under_way.is_object()) torn("its metadata name no windows");
  for (Window& window : windows_) {
    const auto found = under_way.find(window.name);
    if (found == under_way.end()) continue;
    window.taken = read_positions(*found);
    for (std::size_t p = 0; keeps_sums_ && p < offsets_.size(); ++p) {
      const Parameter& parameter = weights_.host().table().parameters[p];
      const std::string name = window.name + "." + parameter.name;
      const SafetensorEntry* entry = file.find(name);
      if (entry == nullptr || entry->dtype != DType::f64 || entry->shape != parameter.shape.sizes())
        torn(fmt::format("tensor '{}' is missing, or not f64 of shape {}", name, parameter.shape.str()));
      file.read_bytes(*entry, 0, std::as_writable_bytes(sums_of(window, p)));
    }
  }
}

std::uint64_t average_host_bytes(const Config& config, std::uint64_t device_weight_bytes, const Backend& backend) {
  if (config.averages.empty()) return 0;
  const auto parameters = static_cast<std::uint64_t>(model_config(config).parameter_count());
  return parameters * (sizeof(double) * config.averages.size() + sizeof(float)) +
         (backend.is_host() ? 0 : device_weight_bytes);
}

}  // namespace kiln

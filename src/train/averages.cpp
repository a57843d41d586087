#include "train/averages.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

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

Averages::Averages(const Config& config, const DeviceWeights& weights, bool keeps_sums, Write write)
    : config_(config), weights_(weights), keeps_sums_(keeps_sums), write_(std::move(write)) {
  std::size_t elements = 0;
  for (const Parameter& parameter : weights.host().table().parameters) {
    offsets_.push_back(elements);
    elements += static_cast<std::size_t>(parameter.shape.numel());
  }
  for (const AverageWindow& options : config.averages) {
    windows_.push_back({.options = options, .evaluates = options.evaluate && !config.data.valid.empty()});
    Window& window = windows_.back();
    window.finished.name = to_string(options);
    if (keeps_sums_ || window.evaluates) window.mean = std::make_unique<ModelWeights>(weights.config(), DType::f32);
    window.finished.weights = window.mean.get();
    if (!keeps_sums_) continue;
    window.sums.resize(elements);
    window.writer = std::make_unique<Worker>();
  }
  if (!keeps_sums_ || weights.shared()) return;
  scratch_ = std::make_unique<ModelWeights>(weights.config(), DType::f32);
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

Averages::Sample Averages::count(Window& window, const RunPosition& at) const {
  check(!window.waits, "Averages::take: the mean of {} waits for its evaluation", window.finished.name);
  std::vector<RunPosition>& taken = window.taken;
  if (!taken.empty() && taken.back().step + window.options.every != at.step) taken.clear();
  taken.push_back(at);
  const Sample sample{.window = &window,
                      .first = taken.size() == 1,
                      .last = static_cast<std::int64_t>(taken.size()) == window.options.count};
  if (sample.last) {
    window.finished.taken = std::exchange(taken, {});
    window.waits = window.evaluates;
  }
  return sample;
}

void Averages::add(const std::vector<Sample>& samples, const ModelWeights& weights) {
  for (const Sample& sample : samples) {
    Window& window = *sample.window;
    for (std::size_t p = 0; p < offsets_.size(); ++p) {
      const std::span<double> sums = sums_of(window, p);
      const std::span<const float> values = weights.view(weights.table().parameters[p]).span<float>();
      parallel_for(static_cast<std::int64_t>(sums.size()), kGrain, [&](std::int64_t begin, std::int64_t end) {
        const auto from = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
        const std::span<double> part = sums.subspan(from, count);
        if (sample.first) std::ranges::fill(part, 0.0);
        add_weighted(std::as_bytes(values.subspan(from, count)), DType::f32, weight_of(window.options), part);
      });
    }
    if (sample.last) round(window);
  }
}

/// The mean of the sums, which are free afterwards.
void Averages::round(Window& window) {
  window.writer->wait();  // until the mean before is on disk
  std::atomic<bool> finite = true;
  for (std::size_t p = 0; p < offsets_.size(); ++p) {
    const std::span<const double> sums = sums_of(window, p);
    const std::span<float> mean = window.mean->view(window.mean->table().parameters[p]).span<float>();
    parallel_for(static_cast<std::int64_t>(sums.size()), kGrain, [&](std::int64_t begin, std::int64_t end) {
      const auto from = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
      if (!round_sum(sums.subspan(from, count), DType::f32, std::as_writable_bytes(mean.subspan(from, count))))
        finite = false;
    });
  }
  window.finished.finite = finite;
  if (!window.evaluates) hand_over(window);
}

/// Lets the window's thread write the mean.
void Averages::hand_over(Window& window) {
  if (window.finished.finite)
    window.writer->post([this, average = window.finished] { write_(average); });
  else if (!not_finite_)
    not_finite_ = window.finished;
}

std::optional<double> Averages::take(const RunPosition& at) {
  if (failed()) wait();
  std::vector<Window*> all;
  for (Window& window : windows_)
    if (due(window, at.step)) all.push_back(&window);
  if (all.empty()) return std::nullopt;
  const auto begin = std::chrono::steady_clock::now();
  if (worker_) worker_->wait();  // the copy before has been added up
  std::vector<Sample> samples;
  for (Window* window : all) samples.push_back(count(*window, at));
  if (!keeps_sums_) return 0.0;
  if (copy_) {
    copy_->start();
    worker_->post([this, samples] {
      weights_.unpack(copy_->wait(), *scratch_);
      add(samples, *scratch_);
    });
  } else {
    add(samples, weights_.host());
  }
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}

std::vector<std::size_t> Averages::to_evaluate() const {
  std::vector<std::size_t> list;
  for (std::size_t i = 0; i < windows_.size(); ++i)
    if (windows_[i].waits) list.push_back(i);
  return list;
}

void Averages::evaluate(std::size_t index, const std::function<void(const FinishedAverage&)>& evaluate) {
  Window& window = windows_[index];
  check(window.waits, "Averages::evaluate: the mean of {} is not complete", window.finished.name);
  if (worker_) worker_->wait();
  window.waits = false;
  evaluate(window.finished);
  if (keeps_sums_) hand_over(window);
}

bool Averages::failed() const {
  return (worker_ && worker_->failed()) ||
         std::ranges::any_of(windows_, [](const Window& window) { return window.writer && window.writer->failed(); });
}

/// The writers belong to worker_'s thread while a job of it is under way (round() and hand_over() wait and post there),
/// so worker_ comes first. An error of a writer that its job runs into ends that job, and no mean follows a lost one.
void Averages::wait() {
  if (worker_) worker_->wait();
  for (const Window& window : windows_)
    if (window.writer) window.writer->wait();
}

std::optional<FinishedAverage> Averages::settle() {
  wait();
  return std::exchange(not_finite_, std::nullopt);
}

void Averages::save(const std::filesystem::path& directory) {
  wait();  // a run that resumes here would not make these means again
  Json under_way = Json::object();
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, std::span<const double>> sums;
  for (Window& window : windows_) {
    if (window.taken.empty()) continue;
    under_way[window.finished.name] = positions_json(window.taken);
    for (std::size_t p = 0; p < offsets_.size(); ++p) {
      const Parameter& parameter = weights_.host().table().parameters[p];
      items.push_back({window.finished.name + "." + parameter.name, DType::f64, parameter.shape.sizes()});
      sums[items.back().name] = sums_of(window, p);
    }
  }
  if (items.empty()) return;
  SafetensorsWriter out(directory / kFile, items, {{"format", "pt"}, {"windows", under_way.dump()}});
  for (const SafetensorsWriter::Item& item : out.layout()) out.append(std::as_bytes(sums.at(item.name)));
  out.finish();
}

void Averages::load(const std::filesystem::path& directory) {
  wait();
  not_finite_.reset();
  for (Window& window : windows_) {
    window.taken.clear();
    window.waits = false;
  }
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
    const auto found = under_way.find(window.finished.name);
    if (found == under_way.end()) continue;
    window.taken = read_positions(*found);
    for (std::size_t p = 0; keeps_sums_ && p < offsets_.size(); ++p) {
      const Parameter& parameter = weights_.host().table().parameters[p];
      const std::string name = window.finished.name + "." + parameter.name;
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
  return parameters * (sizeof(double) + sizeof(float)) * config.averages.size() +
         (backend.is_host() ? 0 : parameters * sizeof(float) + device_weight_bytes);
}

}  // namespace kiln

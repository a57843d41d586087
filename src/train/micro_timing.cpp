#include "train/micro_timing.h"

#include <algorithm>
#include <optional>

#include "base/files.h"
#include "base/json.h"
#include "base/log.h"
#include "train/device.h"
#include "train/step_bench.h"

namespace kiln {
namespace {

constexpr int kSteps = 5;
constexpr double kWorthIt = 0.99;        // of the time of a larger one
constexpr double kClearlySlower = 1.05;  // than the best so far: smaller ones are not tried

/// Ascending.
std::vector<std::int64_t> neighbours(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                     const Backend& backend, Communicator& communicator) {
  std::vector<std::int64_t> list;
  for (const std::int64_t size : micro_batches_of(config, communicator.size())) {
    MemoryChoice other = choice;
    other.micro.sequences = size;
    if (4 * size < choice.micro.sequences || size > 4 * choice.micro.sequences) continue;
    if (size == choice.micro.sequences || packed_memory(config, other, backend, communicator).total() <= budget)
      list.push_back(size);
  }
  return list;
}

/// What the times depend on. Not the optimizer, which runs once a step.
Json subject(const Config& config, const MemoryChoice& choice, const std::vector<std::int64_t>& sizes,
             const Backend& backend, int ranks) {
  const Json all = to_json(config);
  Json json = {{"device", backend.name()},
               {"ranks", ranks},
               {"sequences", config.batch.sequences},
               {"seq_len", config.data.seq_len},
               {"recompute", to_string(choice.recompute)},
               {"sizes", sizes}};
  for (const char* section : {"model", "precision"}) json[section] = all.at(section);
  return json;
}

/// A file's JSON object; empty when there is none, and after a warning when it cannot be read.
Json read_kept(const std::filesystem::path& file) {
  std::error_code missing;
  if (file.empty() || !std::filesystem::is_regular_file(file, missing)) return Json::object();
  try {
    Json json = read_json(file);
    if (json.is_object()) return json;
    log_warning("{}: expected a JSON object; micro-batches are timed again", file.string());
  } catch (const std::exception& e) {
    log_warning("{}; micro-batches are timed again", e.what());
  }
  return Json::object();
}

void write_kept(const std::filesystem::path& file, const Json& json, std::string_view without) {
  if (file.empty()) return;
  try {
    std::filesystem::create_directories(file.parent_path());
    write_text_atomic(file, json.dump(1) + "\n");
  } catch (const std::exception& e) {
    log_warning("batch.micro was not kept ({}); {}", e.what(), without);
  }
}

/// A whole number of `json`, which may be anything.
std::int64_t micro_of(const Json& json) {
  if (!json.is_object() || !json.contains("micro") || !json["micro"].is_number_integer()) return 0;
  return json["micro"].get<std::int64_t>();
}

/// Entries of the cache, without the one for `of`, which is returned apart (0: none).
std::pair<Json, std::int64_t> cached(const std::filesystem::path& file, const Json& of) {
  const Json kept = read_kept(file);
  Json others = Json::array();
  std::int64_t micro = 0;
  if (kept.contains("entries"))
    for (const Json& entry : kept["entries"]) {
      if (entry.is_object() && entry.contains("of") && entry["of"] == of)
        micro = micro_of(entry);
      else
        others.push_back(entry);
    }
  return {std::move(others), micro};
}

struct Timed {
  std::int64_t micro = 0;
  Json step_ms = Json::object();
};

Timed fastest(const std::vector<std::int64_t>& sizes, const MemoryChoice& choice, const StepTimer& timer) {
  Timed best{.micro = choice.micro.sequences};
  double best_seconds = 0;
  for (auto size = sizes.rbegin(); size != sizes.rend(); ++size) {
    MemoryChoice other = choice;
    other.micro.sequences = *size;
    const double seconds = timer(other);
    best.step_ms[std::to_string(*size)] = seconds * 1e3;
    log_info("batch.micro {}: {:.2f} ms a step", *size, seconds * 1e3);
    if (best_seconds > 0 && seconds > kClearlySlower * best_seconds) break;
    if (best_seconds > 0 && seconds >= kWorthIt * best_seconds) continue;
    best.micro = *size;
    best_seconds = seconds;
  }
  return best;
}

/// What rank 0 takes; it does not throw, since the others wait for it.
std::int64_t decide(const std::vector<std::int64_t>& sizes, const MemoryChoice& choice, const Json& of,
                    const MicroTimingFiles& files, const StepTimer& timer) {
  const auto known = [&](std::int64_t size) { return std::ranges::find(sizes, size) != sizes.end(); };
  const std::int64_t own = micro_of(read_kept(files.run));
  if (known(own)) return own;
  if (own != 0)
    log_warning(
        "{}: batch.micro {} is not among what fits now; it is chosen anew, and the run goes on with other rounding",
        files.run.string(), own);
  auto [entries, micro] = cached(files.cache, of);
  if (!known(micro)) {
    try {
      const Timed timed = fastest(sizes, choice, timer);
      micro = timed.micro;
      entries.push_back({{"of", of}, {"micro", micro}, {"step_ms", timed.step_ms}});
      write_kept(files.cache, {{"entries", entries}}, "the next run times it again");
    } catch (const std::exception& e) {
      log_warning("micro-batches could not be timed ({}); taking {}", e.what(), choice.micro.sequences);
      micro = choice.micro.sequences;
    }
  }
  write_kept(files.run, {{"micro", micro}}, "a resumed run may choose another and round differently");
  return micro;
}

}  // namespace

MemoryChoice time_micro_batches(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                const Backend& backend, Communicator& communicator, const MicroTimingFiles& files,
                                const StepTimer& timer) {
  // The list is that of the rank with the least room.
  const auto least = static_cast<std::uint64_t>(-communicator.maximum(-static_cast<double>(budget)));
  const std::vector<std::int64_t> sizes = neighbours(config, choice, least, backend, communicator);
  if (sizes.size() < 2) return choice;
  double micro = 0;
  if (communicator.rank() == 0)
    micro = static_cast<double>(
        decide(sizes, choice, subject(config, choice, sizes, backend, communicator.size()), files, timer));
  MemoryChoice timed = choice;
  timed.micro.sequences = static_cast<std::int64_t>(communicator.maximum(micro));
  return timed;
}

StepTimer bench_timer(const Config& config, Backend& backend, int ranks) {
  return [&config, &backend, ranks](const MemoryChoice& choice) {
    const TrainPlanOptions plan = plan_options(config, choice, backend, ranks);
    return bench_step({.model = plan.model,
                       .optimizer = plan.optimizer,
                       .batch = plan.micro,
                       .micro_batches = plan.micro_batches,
                       .steps = kSteps,
                       .clip_norm = plan.clip_norm,
                       .recompute = plan.recompute,
                       .masters = plan.masters,
                       .gradients = plan.layout.linear_gradients == DType::bf16 ? GradientPrecision::bf16
                                                                                : GradientPrecision::fp32,
                       .by_op = false},
                      backend)
        .step_seconds;
  };
}

}  // namespace kiln

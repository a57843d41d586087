#include "train/micro_timing.h"

#include <algorithm>
#include <filesystem>

#include "base/files.h"
#include "base/json.h"
#include "base/log.h"
#include "train/device.h"
#include "train/step_bench.h"
#include "train/trainer.h"

namespace kiln {
namespace {

constexpr int kSteps = 5;
constexpr double kWorthIt = 0.99;  // of the time of a larger one

/// Ascending.
std::vector<MemoryChoice> neighbours(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                     const Backend& backend, Communicator& communicator) {
  std::vector<MemoryChoice> list;
  for (const std::int64_t size : micro_batches_of(config, communicator.size())) {
    MemoryChoice other = choice;
    other.micro.sequences = size;
    if (4 * size < choice.micro.sequences || size > 4 * choice.micro.sequences) continue;
    if (size == choice.micro.sequences || packed_memory(config, other, backend, communicator).total() <= budget)
      list.push_back(other);
  }
  return list;
}

double step_seconds(const Config& config, const MemoryChoice& choice, Backend& backend, int ranks) {
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
                                                                              : GradientPrecision::fp32},
                    backend)
      .step_seconds;
}

/// Everything that the times depend on.
Json subject(const Config& config, const MemoryChoice& choice, std::uint64_t budget, const Backend& backend,
             int ranks) {
  const Json all = to_json(config);
  Json json = {{"device", backend.name()},
               {"ranks", ranks},
               {"budget", budget},
               {"seq_len", config.data.seq_len},
               {"recompute", to_string(choice.recompute)}};
  for (const char* section : {"model", "batch", "optimizer", "precision"}) json[section] = all.at(section);
  return json;
}

/// The choices that were timed on this machine, newest last.
class Kept {
 public:
  explicit Kept(std::filesystem::path file) : file_(std::move(file)) {
    std::error_code missing;
    if (!std::filesystem::is_regular_file(file_, missing)) return;
    try {
      entries_ = read_json(file_).at("entries");
    } catch (const std::exception& e) {
      log_warning("{}: not readable ({}); micro-batches are timed again", file_.string(), e.what());
      entries_ = Json::array();
    }
  }
  /// 0 when `of` was not timed.
  std::int64_t micro(const Json& of) const {
    for (const Json& entry : entries_)
      if (entry.value("of", Json()) == of) return entry.value("micro", std::int64_t{0});
    return 0;
  }
  void add(const Json& of, std::int64_t micro, const Json& step_ms) {
    entries_.push_back({{"of", of}, {"micro", micro}, {"step_ms", step_ms}});
    std::filesystem::create_directories(file_.parent_path());
    write_text_atomic(file_, Json({{"entries", entries_}}).dump(1) + "\n");
  }

 private:
  std::filesystem::path file_;
  Json entries_ = Json::array();
};

/// On rank 0. The index of the fastest.
std::size_t fastest(const std::vector<MemoryChoice>& list, const Config& config, const Json& of,
                    const std::filesystem::path& file, Backend& backend, int ranks) {
  Kept kept(file);
  const std::int64_t known = kept.micro(of);
  for (std::size_t i = 0; i < list.size(); ++i)
    if (list[i].micro.sequences == known) return i;
  std::size_t best = list.size() - 1;
  double best_seconds = 0;
  Json step_ms = Json::object();
  for (std::size_t i = list.size(); i-- > 0;) {
    const double seconds = step_seconds(config, list[i], backend, ranks);
    step_ms[std::to_string(list[i].micro.sequences)] = seconds * 1e3;
    log_info("batch.micro {}: {:.2f} ms a step", list[i].micro.sequences, seconds * 1e3);
    if (best_seconds > 0 && seconds >= kWorthIt * best_seconds) continue;
    best = i;
    best_seconds = seconds;
  }
  kept.add(of, list[best].micro.sequences, step_ms);
  return best;
}

}  // namespace

MemoryChoice time_micro_batches(const Config& config, const MemoryChoice& choice, std::uint64_t budget,
                                Backend& backend, Communicator& communicator) {
  const std::vector<MemoryChoice> list = neighbours(config, choice, budget, backend, communicator);
  const std::filesystem::path file = cache_file("micro-batches.json");
  if (list.size() < 2 || file.empty()) return choice;
  double best = 0;
  if (communicator.rank() == 0)
    best = static_cast<double>(fastest(list, config, subject(config, choice, budget, backend, communicator.size()),
                                       file, backend, communicator.size()));
  return list[static_cast<std::size_t>(communicator.maximum(best))];
}

}  // namespace kiln

#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.h"
#include "core/dtype.h"
#include "io/dataset.h"
#include "model/llama.h"
#include "optim/optimizer.h"
#include "train/schedule.h"

namespace kiln {

enum class Device { automatic, cpu, cuda };
enum class WeightPrecision { fp32, bf16_sr };
enum class GradientPrecision { automatic, fp32, bf16 };
enum class OnDivergence { stop, merge };
enum class UpdatePlacement { automatic, after_backward, in_backward };

/// Weights averaged while they are trained: every `every` steps, `count` times, then anew.
struct AverageWindow {
  std::int64_t every = 0, count = 0;
  std::optional<std::int64_t> start = {};  // first step; auto: while the rate is constant
  bool evaluate = true;                    // its loss on the validation data, at once
};
/// "20x10", every x count
std::string to_string(const AverageWindow& window);

/// A whole run, as its YAML file says it. An empty optional is `auto`: chosen from the rest.
struct Config {
  struct Run {
    std::string name;
    std::string dir;
    std::uint64_t seed = 1;
    Device device = Device::automatic;
    std::optional<std::int64_t> threads;
    OnDivergence on_divergence = OnDivergence::stop;
  } run;
  struct Model {
    std::string preset;
    std::optional<std::int64_t> hidden, ffn, heads, kv_heads, layers, vocab, max_positions;
    std::optional<bool> tied;
    std::optional<double> rope_base, rms_eps, init_std;
  } model;
  struct Data {
    std::vector<DataSource> train, valid;
    std::int64_t seq_len = 256;
    std::string tokenizer;
  } data;
  struct Batch {
    std::int64_t sequences = 8;         // global
    std::optional<std::int64_t> micro;  // of one rank
  } batch;
  ScheduleOptions schedule;
  struct Optimizer {
    OptimizerKind kind = OptimizerKind::adamw;
    double beta1 = 0.9, beta2 = 0.999;
    std::optional<double> eps;  // likewise
    double weight_decay = 0.0;
    std::int64_t rank = 128;
    std::optional<double> alpha;  // the member's own (optimizer_defaults)
    std::int64_t refresh = 200;
    ProjectorKind projector = ProjectorKind::power;
    FiraVariant variant = FiraVariant::paper;
    double gamma = 1.01;
    std::optional<StatePrecision> states;  // likewise
    StatePrecision projector_states = StatePrecision::fp32;
    std::optional<bool> stagger;  // with the power projector, unless set
    double momentum = 0.95;
    MuonScale muon_scale = MuonScale::match_rms;
    std::int64_t rewarm = 50;
    double clip_norm = 1.0;
  } optimizer;
  struct Precision {
    WeightPrecision weights = WeightPrecision::fp32;
    GradientPrecision gradients = GradientPrecision::automatic;  // of the layers' matrices
  } precision;
  struct Memory {
    std::optional<std::uint64_t> budget;  // bytes
    std::optional<Recompute> recompute;
    std::optional<std::int64_t> recompute_layers;  // the first so many; the others by the policy before
    UpdatePlacement update = UpdatePlacement::automatic;
  } memory;
  struct Parallel {
    std::int64_t zero = 0;
  } parallel;
  struct Checkpoint {
    std::int64_t every = 500;
    std::int64_t keep = 3;
  } checkpoint;
  struct Rescue {                  // run.on_divergence: merge
    std::int64_t checkpoints = 3;  // merged, the newest from before the divergence
    std::int64_t limit = 2;        // rescues of a run
    std::int64_t skip = 1;         // batches left out, the offending one first
    std::optional<double> spike;   // a loss above this many medians diverges as well
  } rescue;
  struct Snapshots {
    std::int64_t every = 0;  // 0: none
    DType dtype = DType::f32;
    std::optional<std::int64_t> start;  // first step; auto: after warm-up, while the rate is constant
  } snapshots;
  std::vector<AverageWindow> averages;
  struct Eval {
    std::int64_t every = 200;
    std::int64_t tokens = 1'000'000;
    std::optional<std::int64_t> micro;
  } eval;
};

/// Reads a YAML file and applies `section.key=value` overrides, in order. A usage Error names file:line:column (or the
/// override), the key, what was found and what was expected; an unknown key, the nearest valid one.
Config load_config(const std::filesystem::path& path, std::span<const std::string> overrides);
/// The same from text; `name` stands for the file in errors.
Config parse_config(const std::string& text, const std::string& name, std::span<const std::string> overrides);

/// Every key, in order; both read back as the same configuration.
Json to_json(const Config& config);
std::string to_yaml(const Config& config);

/// Values that do not fit together; called by load_config.
void validate(const Config& config);
/// Refuses, in a sentence, settings that the contract names and this build cannot do; called before training.
void check_supported(const Config& config);
/// The same where run.device: auto means `automatic`, cpu or cuda, whatever this machine has.
void check_supported(const Config& config, Device automatic);

/// A page of every key, its default and meaning.
std::string config_help();

/// Whether the snapshot of a step that `snapshots.every` divides is due in this phase of the schedule.
bool snapshot_due_phase(const Config& config, std::int64_t step);

}  // namespace kiln

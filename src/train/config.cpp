#include "train/config.h"

#include <algorithm>
#include <functional>
#include <set>

#include "base/files.h"
#include "base/text.h"
#include "model/llama_config.h"
#include "train/config_values.h"

namespace kiln {
namespace config_values {

template <>
std::span<const Spelling<Device>> spellings() {
  static constexpr Spelling<Device> kAll[] = {
      {"auto", Device::automatic}, {"cpu", Device::cpu}, {"cuda", Device::cuda}};
  return kAll;
}
template <>
std::span<const Spelling<ScheduleKind>> spellings() {
  static constexpr Spelling<ScheduleKind> kAll[] = {{"constant", ScheduleKind::constant},
                                                    {"linear", ScheduleKind::linear},
                                                    {"cosine", ScheduleKind::cosine},
                                                    {"wsd", ScheduleKind::wsd}};
  return kAll;
}
template <>
std::span<const Spelling<DecayShape>> spellings() {
  static constexpr Spelling<DecayShape> kAll[] = {
      {"linear", DecayShape::linear}, {"cosine", DecayShape::cosine}, {"1-sqrt", DecayShape::one_minus_sqrt}};
  return kAll;
}
template <>
std::span<const Spelling<OptimizerKind>> spellings() {
  static const std::vector<Spelling<OptimizerKind>> kAll = [] {
    std::vector<Spelling<OptimizerKind>> list;
    for (const OptimizerKind kind : optimizer_kinds()) list.push_back({to_string(kind), kind});
    return list;
  }();
  return kAll;
}
template <>
std::span<const Spelling<ProjectorKind>> spellings() {
  static constexpr Spelling<ProjectorKind> kAll[] = {{"power", ProjectorKind::power}, {"svd", ProjectorKind::svd}};
  return kAll;
}
template <>
std::span<const Spelling<MuonScale>> spellings() {
  static constexpr Spelling<MuonScale> kAll[] = {{"match_rms", MuonScale::match_rms},
                                                 {"spectral", MuonScale::spectral}};
  return kAll;
}
template <>
std::span<const Spelling<FiraVariant>> spellings() {
  static constexpr Spelling<FiraVariant> kAll[] = {{"paper", FiraVariant::paper},
                                                   {"reference", FiraVariant::reference}};
  return kAll;
}
template <>
std::span<const Spelling<StatePrecision>> spellings() {
  static constexpr Spelling<StatePrecision> kAll[] = {
      {"fp32", StatePrecision::fp32}, {"bf16", StatePrecision::bf16}, {"int8", StatePrecision::int8}};
  return kAll;
}
template <>
std::span<const Spelling<GradientPrecision>> spellings() {
  static constexpr Spelling<GradientPrecision> kAll[] = {
      {"auto", GradientPrecision::automatic}, {"fp32", GradientPrecision::fp32}, {"bf16", GradientPrecision::bf16}};
  return kAll;
}
template <>
std::span<const Spelling<WeightPrecision>> spellings() {
  static constexpr Spelling<WeightPrecision> kAll[] = {{"fp32", WeightPrecision::fp32},
                                                       {"bf16_sr", WeightPrecision::bf16_sr}};
  return kAll;
}
template <>
std::span<const Spelling<Recompute>> spellings() {
  static constexpr Spelling<Recompute> kAll[] = {
      {"none", Recompute::none}, {"norms", Recompute::norms}, {"block", Recompute::block}};
  return kAll;
}
template <>
std::span<const Spelling<OnDivergence>> spellings() {
  static constexpr Spelling<OnDivergence> kAll[] = {{"stop", OnDivergence::stop}, {"merge", OnDivergence::merge}};
  return kAll;
}
template <>
std::span<const Spelling<UpdatePlacement>> spellings() {
  static constexpr Spelling<UpdatePlacement> kAll[] = {{"auto", UpdatePlacement::automatic},
                                                       {"after_backward", UpdatePlacement::after_backward},
                                                       {"in_backward", UpdatePlacement::in_backward}};
  return kAll;
}
template <>
std::span<const Spelling<DType>> spellings() {
  static constexpr Spelling<DType> kAll[] = {{"fp32", DType::f32}, {"bf16", DType::bf16}};
  return kAll;
}

template <typename E>
requires std::is_enum_v<E>
void read(const YAML::Node& node, const Place& place, E& out) {
  std::string text, known;
  std::vector<std::string_view> names;
  for (const Spelling<E>& spelling : spellings<E>()) {
    names.push_back(spelling.name);
    known += fmt::format("{}{}", known.empty() ? "" : ", ", spelling.name);
  }
  read(node, place, text);
  for (const Spelling<E>& spelling : spellings<E>())
    if (spelling.name == text) {
      out = spelling.value;
      return;
    }
  fail(ExitCode::usage, "{} '{}' is not known; did you mean '{}'? (one of {})", place.at(node), text,
       nearest(text, names), known);
}
template <typename E>
requires std::is_enum_v<E> Json write(E value) {
  for (const Spelling<E>& spelling : spellings<E>())
    if (spelling.value == value) return std::string(spelling.name);
  return nullptr;
}

/// `auto` and an empty value leave it to be chosen.
template <typename T>
void read(const YAML::Node& node, const Place& place, std::optional<T>& out) {
  if (node.IsNull() || (node.IsScalar() && node.Scalar() == "auto")) {
    out.reset();
    return;
  }
  read(node, place, out.emplace());
}
template <typename T>
Json write(const std::optional<T>& value) {
  return value ? write(*value) : Json("auto");
}

}  // namespace config_values

namespace {

using config_values::Place;

/// One key: the single place that parsing, writing, the list of valid keys and the help page come from.
struct Field {
  std::string_view key, meaning;
  std::function<void(Config&, const YAML::Node&, const Place&)> read;
  std::function<Json(const Config&)> write;
};

template <typename Access>
Field field(std::string_view key, Access access, std::string_view meaning) {
  return {
      key, meaning,
      [access](Config& c, const YAML::Node& node, const Place& place) { config_values::read(node, place, access(c)); },
      [access](const Config& c) { return config_values::write(access(c)); }};
}

#define KILN_FIELD(key, member, meaning) \
  field(                                 \
      key, [](auto& c) -> auto& { return c.member; }, meaning)

const std::vector<Field>& fields() {
  static const std::vector<Field> kFields{
      KILN_FIELD("run.name", run.name, "name in reports; default: the last part of run.dir"),
      KILN_FIELD("run.dir", run.dir, "directory of metrics, checkpoints and snapshots"),
      KILN_FIELD("run.seed", run.seed, "of initialisation, data order and projectors"),
      KILN_FIELD("run.device", run.device, "auto | cpu | cuda"),
      KILN_FIELD("run.threads", run.threads, "threads of a rank; auto: the processors it may use"),
      KILN_FIELD("run.on_divergence", run.on_divergence,
                 "stop (exit code 5) | merge (go on from the mean of the last checkpoints)"),
      KILN_FIELD("model.preset", model.preset, "llama_{9m,60m,130m,350m,1b,7b}; the keys below override it"),
      KILN_FIELD("model.hidden", model.hidden, "model width C"),
      KILN_FIELD("model.ffn", model.ffn, "width of the SwiGLU"),
      KILN_FIELD("model.heads", model.heads, "query heads"),
      KILN_FIELD("model.kv_heads", model.kv_heads, "key and value heads (GQA)"),
      KILN_FIELD("model.layers", model.layers, "blocks"),
      KILN_FIELD("model.vocab", model.vocab, "vocabulary"),
      KILN_FIELD("model.tied", model.tied, "the head shares the embedding's weight"),
      KILN_FIELD("model.rope_base", model.rope_base, "base of the rotary embedding"),
      KILN_FIELD("model.rms_eps", model.rms_eps, "epsilon of RMSNorm"),
      KILN_FIELD("model.init_std", model.init_std, "standard deviation of initial weights"),
      KILN_FIELD("model.max_positions", model.max_positions, "longest sequence, as config.json says it"),
      KILN_FIELD("data.train", data.train, "token shards: a pattern, or a list of {path, weight}"),
      KILN_FIELD("data.valid", data.valid, "token shards held out"),
      KILN_FIELD("data.seq_len", data.seq_len, "tokens of a sample"),
      KILN_FIELD("data.tokenizer", data.tokenizer, "SentencePiece model, copied into checkpoints"),
      KILN_FIELD("batch.sequences", batch.sequences, "samples of a step over all ranks"),
      KILN_FIELD(
          "batch.micro", batch.micro,
          "samples of one pass of a rank; auto: 2048 tokens on the CPU, 2^26/C on a GPU, less where memory asks"),
      KILN_FIELD("schedule.kind", schedule.kind, "constant | linear | cosine | wsd"),
      KILN_FIELD("schedule.peak_lr", schedule.peak_lr, "learning rate after warm-up"),
      KILN_FIELD("schedule.warmup_steps", schedule.warmup_steps, "linear warm-up from 0"),
      KILN_FIELD("schedule.total_steps", schedule.total_steps, "updates"),
      KILN_FIELD("schedule.decay_steps", schedule.decay_steps, "wsd: the last steps, which anneal"),
      KILN_FIELD("schedule.decay_shape", schedule.decay_shape, "wsd: linear | cosine | 1-sqrt"),
      KILN_FIELD("schedule.final_ratio", schedule.final_ratio, "last learning rate over peak_lr"),
      KILN_FIELD("optimizer.kind", optimizer.kind,
                 "adamw | adam8bit | galore | fira | fira+ | apollo | apollo_mini | muon | lora | relora"),
      KILN_FIELD("optimizer.beta1", optimizer.beta1, "decay of the first moment"),
      KILN_FIELD("optimizer.beta2", optimizer.beta2, "decay of the second moment"),
      KILN_FIELD("optimizer.eps", optimizer.eps, "auto: 1e-6 for galore, fira, fira+ and apollo, else 1e-8"),
      KILN_FIELD("optimizer.weight_decay", optimizer.weight_decay, "decoupled; not on norms"),
      KILN_FIELD("optimizer.rank", optimizer.rank, "of the subspace"),
      KILN_FIELD(
          "optimizer.alpha", optimizer.alpha,
          "scale of the low-rank update; auto: 0.25 for galore and fira, 1 for apollo (enters by its root), 128 for "
          "apollo_mini, 32 for lora (over the rank)"),
      KILN_FIELD("optimizer.refresh", optimizer.refresh, "steps between two refreshes of the subspace"),
      KILN_FIELD("optimizer.projector", optimizer.projector,
                 "power | svd (exact; on a GPU it waits for the device at every step, power never)"),
      KILN_FIELD("optimizer.variant", optimizer.variant, "fira: paper | reference (the authors' code)"),
      KILN_FIELD("optimizer.gamma", optimizer.gamma, "fira, apollo: largest growth of the norm in a step"),
      KILN_FIELD("optimizer.states", optimizer.states,
                 "of moments: fp32 | bf16 | int8; auto: int8 for adam8bit, else fp32"),
      KILN_FIELD("optimizer.projector_states", optimizer.projector_states, "of the basis: fp32 | bf16 | int8"),
      KILN_FIELD("optimizer.stagger", optimizer.stagger,
                 "refresh the matrices in turns over an interval; auto: with projector power, not with svd"),
      KILN_FIELD("optimizer.momentum", optimizer.momentum, "muon"),
      KILN_FIELD("optimizer.muon_scale", optimizer.muon_scale,
                 "match_rms (steps as large as Adam's) | spectral (of one spectral norm)"),
      KILN_FIELD("optimizer.rewarm", optimizer.rewarm, "relora: steps of the warm-up after a restart"),
      KILN_FIELD("optimizer.clip_norm", optimizer.clip_norm, "largest global gradient norm; 0: no clipping"),
      KILN_FIELD("precision.weights", precision.weights, "fp32 | bf16_sr"),
      KILN_FIELD(
          "precision.gradients", precision.gradients,
          "of the layers' matrices, on a GPU: fp32 | bf16 (one micro-batch, one rank); auto: bf16 where it may be"),
      KILN_FIELD("memory.budget", memory.budget, "bytes of one rank, such as 24GiB; auto: the GPU's memory"),
      KILN_FIELD("memory.recompute", memory.recompute,
                 "auto (the first that fits) | none | norms (outputs of norms and SwiGLU) | block (whole layers)"),
      KILN_FIELD("memory.recompute_layers", memory.recompute_layers,
                 "with norms or block: the first so many layers, the others by the policy before it; auto: all"),
      KILN_FIELD("memory.update", memory.update, "auto | after_backward | in_backward"),
      KILN_FIELD("parallel.zero", parallel.zero, "0 | 1"),
      KILN_FIELD("checkpoint.every", checkpoint.every, "steps between checkpoints; 0: only the last"),
      KILN_FIELD("checkpoint.keep", checkpoint.keep, "checkpoints kept; 0: all"),
      KILN_FIELD("rescue.checkpoints", rescue.checkpoints, "on_divergence merge: how many are averaged"),
      KILN_FIELD("rescue.limit", rescue.limit, "rescues of a run; the next divergence stops it"),
      KILN_FIELD("rescue.skip", rescue.skip, "batches left out, the offending one first"),
      KILN_FIELD("rescue.spike", rescue.spike,
                 "a loss above this many times the median of the last 64 diverges too; auto: only one not finite"),
      KILN_FIELD("snapshots.every", snapshots.every, "steps between snapshots for merging; 0: none"),
      KILN_FIELD("snapshots.dtype", snapshots.dtype, "fp32 | bf16"),
      KILN_FIELD("snapshots.start", snapshots.start, "first step; auto: while the learning rate is constant"),
      KILN_FIELD("averages", averages,
                 "means of weights while they train, a list of {every, count, start: auto, eval: true}"),
      KILN_FIELD("eval.every", eval.every, "steps between validations; 0: only the last"),
      KILN_FIELD("eval.tokens", eval.tokens, "tokens of one validation"),
      KILN_FIELD("eval.micro", eval.micro, "samples of one pass; auto: as batch.micro"),
  };
  return kFields;
}
#undef KILN_FIELD

const Field* find_field(std::string_view key) {
  const auto found = std::find_if(fields().begin(), fields().end(), [&](const Field& f) { return f.key == key; });
  return found == fields().end() ? nullptr : &*found;
}

std::string_view section_of(std::string_view key) { return key.substr(0, key.find('.')); }

[[noreturn]] void unknown_key(const Place& place, const YAML::Node& node) {
  std::vector<std::string_view> known;
  for (const Field& f : fields()) {
    known.push_back(f.key);
    if (place.key.find('.') == std::string::npos) known.push_back(section_of(f.key));
  }
  fail(ExitCode::usage, "{} is not a known key; did you mean '{}'?", place.at(node), nearest(place.key, known));
}

void read_section(Config& config, const std::string& file, const std::string& section, const YAML::Node& values) {
  std::set<std::string> seen;
  if (values.IsNull()) return;
  if (!values.IsMap()) config_values::bad_value({file, section}, values, "a map of keys");
  for (const auto& item : values) {
    const Place place{file, section + "." + item.first.as<std::string>()};
    const Field* known = find_field(place.key);
    if (known == nullptr) unknown_key(place, item.first);
    if (!seen.insert(place.key).second) fail(ExitCode::usage, "{} is set twice; keep one", place.at(item.first));
    known->read(config, item.second, place);
  }
}

void apply_override(Config& config, const std::string& text) {
  const std::size_t equals = text.find('=');
  check(equals != std::string::npos && equals > 0, "'{}' is not an override; write section.key=value", text);
  const Place place{fmt::format("override {}", text), text.substr(0, equals), false};
  const Field* known = find_field(place.key);
  YAML::Node value;
  try {
    value = YAML::Load(text.substr(equals + 1));
  } catch (const YAML::Exception& e) {
    fail(ExitCode::usage, "override {}: not a YAML value ({})", text, e.msg);
  }
  if (known == nullptr) unknown_key(place, value);
  known->read(config, value, place);
}

}  // namespace

Config parse_config(const std::string& text, const std::string& name, std::span<const std::string> overrides) {
  Config config;
  YAML::Node root;
  try {
    root = YAML::Load(text);
  } catch (const YAML::Exception& e) {
    fail(ExitCode::usage, "{}:{}:{}: not valid YAML ({})", name, e.mark.line + 1, e.mark.column + 1, e.msg);
  }
  if (!root.IsMap() && !root.IsNull()) fail(ExitCode::usage, "{}: expected a map of sections", name);
  std::set<std::string> seen;
  for (const auto& item : root) {
    const Place place{name, item.first.as<std::string>()};
    const bool known =
        std::any_of(fields().begin(), fields().end(), [&](const Field& f) { return section_of(f.key) == place.key; });
    if (!known) unknown_key(place, item.first);
    if (!seen.insert(place.key).second) fail(ExitCode::usage, "{} is set twice; keep one", place.at(item.first));
    if (const Field* whole = find_field(place.key))
      whole->read(config, item.second, place);
    else
      read_section(config, name, place.key, item.second);
  }
  for (const std::string& text_override : overrides) apply_override(config, text_override);
  if (config.run.name.empty()) config.run.name = std::filesystem::path(config.run.dir).filename().string();
  validate(config);
  return config;
}

Config load_config(const std::filesystem::path& path, std::span<const std::string> overrides) {
  if (!std::filesystem::is_regular_file(path))
    fail(ExitCode::usage, "{}: no such configuration file; see configs/ for examples", path.string());
  return parse_config(read_text(path), path.string(), overrides);
}

Json to_json(const Config& config) {
  Json json = Json::object();
  for (const Field& f : fields()) {
    const std::string section(section_of(f.key));
    if (section == f.key)
      json[section] = f.write(config);
    else
      json[section][std::string(f.key.substr(section.size() + 1))] = f.write(config);
  }
  return json;
}

std::string to_yaml(const Config& config) {
  std::string text;
  const Json json = to_json(config);
  for (const auto& [section, values] : json.items()) {
    text += section + (values.is_object() ? ":\n" : fmt::format(": {}\n", values.dump()));
    if (!values.is_object()) continue;
    // A JSON value is a YAML value, so quoting and lists need no code of their own.
    for (const auto& [key, value] : values.items()) text += fmt::format("  {}: {}\n", key, value.dump());
  }
  return text;
}

std::string config_help() {
  std::string text = "Keys of a configuration (YAML, or section.key=value on the command line), with defaults:\n";
  const Config defaults;
  for (const Field& f : fields())
    text += fmt::format("  {:<24} {:<10} {}\n", f.key, f.write(defaults).dump(), f.meaning);
  return text;
}

std::string to_string(const AverageWindow& window) { return fmt::format("{}x{}", window.every, window.count); }

bool snapshot_due_phase(const Config& config, std::int64_t step) {
  if (config.snapshots.start) return step >= *config.snapshots.start;
  return in_constant_phase(config.schedule, step);
}

}  // namespace kiln

#include "base/text.h"
#include "train/member_results.h"
#include "train/memory_report.h"

// How a memory report reads: JSON with exact bytes, and tables for people.
namespace kiln {
namespace {

template <typename T>
Json optional_json(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json formula_json(const OptimizerMemory& memory) {
  const MemoryFormula& f = memory.formula;
  return {{"weights", f.weights},
          {"gradients", f.gradients},
          {"states", f.states},
          {"states_of_a_matrix", state_formula(memory.kind)},
          {"activations", f.activations},
          {"workspace", f.workspace},
          {"total", f.total()}};
}

Json packed_json(const PackedMemory& p) {
  return {{"weights", p.weights},
          {"states", p.states},
          {"arena", p.arena},
          {"arena_peak",
           {{"gradients", p.peak_gradients}, {"activations", p.peak_activations}, {"workspace", p.peak_workspace}}},
          {"evaluation", p.evaluation},
          {"inputs", p.inputs},
          {"total", p.total()}};
}

Json recompute_json(const OptimizerMemory& memory) {
  Json list = Json::array();
  for (const RecomputeMemory& row : memory.recompute)
    list.push_back({{"recompute", to_string(row.recompute)},
                    {"bytes", row.bytes},
                    {"largest_micro", optional_json(row.largest_micro)}});
  return list;
}

/// null: all.
Json layers_json(const Recomputation& recompute) {
  return recompute.layers == Recomputation::kAll ? Json(nullptr) : Json(recompute.layers);
}

Json choice_json(const std::optional<MemoryChoice>& choice) {
  if (!choice) return nullptr;
  return {{"micro", choice->micro.sequences},
          {"recompute", to_string(choice->recompute.policy)},
          {"recompute_layers", layers_json(choice->recompute)}};
}

/// Rows of a label and one cell for each optimizer.
class Table {
 public:
  void row(std::string_view label, const std::vector<std::string>& cells) {
    text_ += fmt::format("{:<28}", label);
    for (const std::string& cell : cells) text_ += fmt::format("{:>15}", cell);
    text_ += '\n';
  }
  void line(std::string_view text) { text_ += fmt::format("{}\n", text); }
  std::string text() const { return text_; }

 private:
  std::string text_;
};

template <typename Value>
std::vector<std::string> cells(const MemoryReport& report, Value value) {
  std::vector<std::string> list;
  for (const OptimizerMemory& memory : report.optimizers) list.push_back(value(memory));
  return list;
}
template <typename Bytes>
void bytes_row(Table& table, const MemoryReport& report, std::string_view label, Bytes bytes) {
  table.row(label, cells(report, [&](const OptimizerMemory& memory) { return human_bytes(bytes(memory)); }));
}

void role_rows(Table& table, const MemoryReport& report) {
  using M = const OptimizerMemory&;
  table.row("formula, bytes of one rank", cells(report, [](M m) { return std::string(to_string(m.kind)); }));
  bytes_row(table, report, "  weights", [](M m) { return m.formula.weights; });
  bytes_row(table, report, "  gradients", [](M m) { return m.formula.gradients; });
  bytes_row(table, report, "  states", [](M m) { return m.formula.states; });
  bytes_row(table, report, "  activations", [](M m) { return m.formula.activations; });
  bytes_row(table, report, "  workspace", [](M m) { return m.formula.workspace; });
  bytes_row(table, report, "  total", [](M m) { return m.formula.total(); });
  table.line("packed, as it is allocated");
  bytes_row(table, report, "  weights", [](M m) { return m.packed.weights; });
  bytes_row(table, report, "  states", [](M m) { return m.packed.states; });
  bytes_row(table, report, "  arena", [](M m) { return m.packed.arena; });
  bytes_row(table, report, "    gradients at its peak", [](M m) { return m.packed.peak_gradients; });
  bytes_row(table, report, "    activations", [](M m) { return m.packed.peak_activations; });
  bytes_row(table, report, "    workspace", [](M m) { return m.packed.peak_workspace; });
  bytes_row(table, report, "  evaluation", [](M m) { return m.packed.evaluation; });
  if (report.device != "cpu") bytes_row(table, report, "  inputs and staging", [](M m) { return m.packed.inputs; });
  bytes_row(table, report, "  total", [](M m) { return m.packed.total(); });
  table.line("");
  table.row("states of an m x n matrix", cells(report, [](M m) { return std::string(state_formula(m.kind)); }));
  table.line(
      fmt::format("  m <= n, r = min({}, m), 1 for apollo_mini; 2mn for embedding, head and norms", report.rank));
  table.line(fmt::format("  moments {} (adam8bit, and embedding and head of fira+: int8), basis {}\n",
                         to_string(report.states), to_string(report.projector_states)));
}

std::string fitting(std::uint64_t bytes, const std::optional<std::uint64_t>& budget) {
  return human_bytes(bytes) + (!budget ? "" : bytes <= *budget ? " fits" : "   no");
}

std::string number_or_none(const std::optional<std::int64_t>& number) {
  return number ? std::to_string(*number) : "none";
}

void micro_rows(Table& table, const MemoryReport& report) {
  using M = const OptimizerMemory&;
  table.row("micro-batch, packed total", cells(report, [](M m) { return std::string(to_string(m.kind)); }));
  for (std::size_t i = 0; i < report.optimizers.front().micro.size(); ++i)
    table.row(fmt::format("  {}", report.optimizers.front().micro[i].micro),
              cells(report, [&](M m) { return fitting(m.micro[i].bytes, report.budget); }));
  if (!report.budget) return;
  table.row(fmt::format("largest within {}", human_bytes(*report.budget)),
            cells(report, [](M m) { return number_or_none(m.largest_micro); }));
  table.row(fmt::format("largest rank at micro {}", report.micro.sequences),
            cells(report, [](M m) { return !has_rank(m.kind) ? std::string("-") : number_or_none(m.largest_rank); }));
}

/// "64 norms": a micro-batch and how it recomputes; "64 block:7" the first seven layers.
std::string choice_text(const std::optional<MemoryChoice>& choice) {
  if (!choice) return "none";
  std::string text = fmt::format("{} {}", choice->micro.sequences, to_string(choice->recompute.policy));
  if (choice->recompute.layers != Recomputation::kAll) text += fmt::format(":{}", choice->recompute.layers);
  return text;
}

void recompute_rows(Table& table, const MemoryReport& report) {
  using M = const OptimizerMemory&;
  table.line("");
  table.row(fmt::format("recompute, at micro {}", report.micro.sequences),
            cells(report, [](M m) { return std::string(to_string(m.kind)); }));
  for (std::size_t i = 0; i < std::size(kRecomputes); ++i) {
    table.row(fmt::format("  {}", to_string(kRecomputes[i])),
              cells(report, [&](M m) { return fitting(m.recompute[i].bytes, report.budget); }));
    if (report.budget)
      table.row("    largest micro-batch",
                cells(report, [&](M m) { return number_or_none(m.recompute[i].largest_micro); }));
  }
  if (report.budget) table.row("training takes", cells(report, [](M m) { return choice_text(m.choice); }));
}

std::string preset_text(const PresetMemory::Entry& entry) {
  const std::string micro = std::to_string(*entry.largest_micro);
  return entry.recompute == Recompute::none ? micro : fmt::format("{} {}", micro, to_string(entry.recompute));
}

void preset_rows(Table& table, const MemoryReport& report) {
  table.line("");
  table.row(report.budget ? "preset, largest micro-batch" : "preset, micro-batch of 1",
            cells(report, [](const OptimizerMemory& m) { return std::string(to_string(m.kind)); }));
  for (const PresetMemory& preset : report.presets) {
    std::vector<std::string> row;
    for (const PresetMemory::Entry& entry : preset.optimizers)
      row.push_back(!entry.smallest       ? "-"
                    : !report.budget      ? human_bytes(entry.smallest->bytes)
                    : entry.largest_micro ? preset_text(entry)
                                          : fmt::format("no, {}", human_bytes(entry.smallest->bytes)));
    table.row(fmt::format("  {:<12}{:>8}", preset.name, human_count(static_cast<double>(preset.parameters))), row);
  }
}

/// Of what a budget leaves: all members where there is none.
std::vector<OptimizerKind> trainable(const MemoryReport& report) {
  std::vector<OptimizerKind> kinds;
  for (const OptimizerMemory& memory : report.optimizers)
    if (!report.budget || memory.choice) kinds.push_back(memory.kind);
  return kinds;
}

void result_rows(Table& table, const MemoryReport& report) {
  const std::vector<OptimizerKind> kinds = trainable(report);
  table.line(
      fmt::format("\nvalidation perplexity of the members that {}, best first (a row compares within itself alone)",
                  report.budget ? "fit" : "run there"));
  for (const MemberTable& results : nearest_results(report.model.parameter_count())) {
    std::string row;
    for (const MemberResult& result : ranked(results, kinds))
      row += fmt::format("{}{} {:.2f}", row.empty() ? "" : ", ", to_string(result.kind), result.perplexity);
    table.line(fmt::format("  {} ({}): {}", results.model, results.source, row.empty() ? "none" : row));
  }
}

Json results_json(const MemoryReport& report) {
  const std::vector<OptimizerKind> kinds = trainable(report);
  Json json = Json::array();
  for (const MemberTable& results : nearest_results(report.model.parameter_count())) {
    Json ranking = Json::array();
    for (const MemberResult& result : ranked(results, kinds))
      ranking.push_back({{"optimizer", to_string(result.kind)}, {"perplexity", result.perplexity}});
    json.push_back({{"model", results.model}, {"source", results.source}, {"ranking", ranking}});
  }
  return json;
}

}  // namespace

Json to_json(const MemoryReport& report) {
  Json json{{"name", report.name},
            {"device", report.device},
            {"parameters", report.model.parameter_count()},
            {"seq_len", report.micro.seq_len},
            {"micro", report.micro.sequences},
            {"recompute", to_string(report.recompute.policy)},
            {"recompute_layers", layers_json(report.recompute)},
            {"micro_batches", report.micro_batches},
            {"ranks", report.ranks},
            {"rank", report.rank},
            {"states", to_string(report.states)},
            {"projector_states", to_string(report.projector_states)},
            {"budget_bytes", optional_json(report.budget)},
            {"averages_host_bytes", report.averages_host},
            {"optimizers", Json::array()},
            {"refused", Json::array()},
            {"presets", Json::array()},
            {"results", results_json(report)}};
  for (const MemoryReport::Refused& refused : report.refused)
    json["refused"].push_back({{"optimizer", to_string(refused.kind)}, {"reason", refused.reason}});
  for (const OptimizerMemory& memory : report.optimizers) {
    Json micro = Json::array();
    for (const MicroMemory& row : memory.micro) {
      micro.push_back({{"micro", row.micro}, {"bytes", row.bytes}});
      if (report.budget) micro.back()["fits"] = row.bytes <= *report.budget;
    }
    json["optimizers"].push_back({{"optimizer", to_string(memory.kind)},
                                  {"formula", formula_json(memory)},
                                  {"packed", packed_json(memory.packed)},
                                  {"micro", micro},
                                  {"recompute", recompute_json(memory)},
                                  {"choice", choice_json(memory.choice)},
                                  {"largest_micro", optional_json(memory.largest_micro)},
                                  {"largest_rank", optional_json(memory.largest_rank)}});
  }
  for (const PresetMemory& preset : report.presets) {
    Json entries = Json::array();
    for (const PresetMemory::Entry& entry : preset.optimizers)
      entries.push_back({{"optimizer", to_string(entry.kind)},
                         {"recompute", to_string(entry.recompute)},
                         {"bytes_at_micro_1", entry.smallest ? Json(entry.smallest->bytes) : Json(nullptr)},
                         {"largest_micro", optional_json(entry.largest_micro)}});
    json["presets"].push_back({{"name", preset.name}, {"parameters", preset.parameters}, {"optimizers", entries}});
  }
  return json;
}

std::string memory_tables(const MemoryReport& report) {
  Table table;
  table.line(fmt::format("{}: {} parameters on {}, sequences of {}, {} micro-batch{} of {} a step on each of {} rank{}",
                         report.name, human_count(static_cast<double>(report.model.parameter_count())), report.device,
                         report.micro.seq_len, report.micro_batches, report.micro_batches == 1 ? "" : "es",
                         report.micro.sequences, report.ranks, report.ranks == 1 ? "" : "s"));
  if (report.micro_is_timed)
    table.line(
        fmt::format("batch.micro auto: a run times micro-batches from {} to {} that fit and takes the fastest; set "
                    "batch.micro to plan for one",
                    std::max<std::int64_t>(1, report.micro.sequences / 4), 4 * report.micro.sequences));
  for (const MemoryReport::Refused& refused : report.refused)
    table.line(fmt::format("{}: {}", to_string(refused.kind), refused.reason));
  table.line("");
  role_rows(table, report);
  if (report.averages_host > 0)
    table.line(fmt::format("averages: {} of host memory on the first rank, not counted above\n",
                           human_bytes(report.averages_host)));
  micro_rows(table, report);
  recompute_rows(table, report);
  preset_rows(table, report);
  result_rows(table, report);
  return table.text();
}

}  // namespace kiln

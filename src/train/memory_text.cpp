#include "base/text.h"
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
          {"total", p.total()}};
}

/// Rows of a label and one cell for each optimizer.
class Table {
 public:
  void row(std::string_view label, const std::vector<std::string>& cells) {
    text_ += fmt::format("{:<28}", label);
    for (const std::string& cell : cells) text_ += fmt::format("{:>18}", cell);
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
  bytes_row(table, report, "  total", [](M m) { return m.packed.total(); });
  table.line("");
  table.row("states of an m x n matrix", cells(report, [](M m) { return std::string(state_formula(m.kind)); }));
  table.line(fmt::format("  m <= n, r = min({}, m); 2mn for embedding, head and norms\n", report.rank));
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
  table.row(fmt::format("largest rank at micro {}", report.micro.sequences), cells(report, [](M m) {
              return m.kind == OptimizerKind::adamw ? std::string("-") : number_or_none(m.largest_rank);
            }));
}

void preset_rows(Table& table, const MemoryReport& report) {
  table.line("");
  table.row(report.budget ? "preset, largest micro-batch" : "preset, micro-batch of 1",
            cells(report, [](const OptimizerMemory& m) { return std::string(to_string(m.kind)); }));
  for (const PresetMemory& preset : report.presets) {
    std::vector<std::string> row;
    for (const PresetMemory::Entry& entry : preset.optimizers)
      row.push_back(!report.budget        ? human_bytes(entry.smallest.bytes)
                    : entry.largest_micro ? std::to_string(*entry.largest_micro)
                                          : fmt::format("no, {}", human_bytes(entry.smallest.bytes)));
    table.row(fmt::format("  {:<12}{:>8}", preset.name, human_count(static_cast<double>(preset.parameters))), row);
  }
}

}  // namespace

Json to_json(const MemoryReport& report) {
  Json json{{"name", report.name},
            {"parameters", report.model.parameter_count()},
            {"seq_len", report.micro.seq_len},
            {"micro", report.micro.sequences},
            {"micro_batches", report.micro_batches},
            {"ranks", report.ranks},
            {"rank", report.rank},
            {"budget_bytes", optional_json(report.budget)},
            {"optimizers", Json::array()},
            {"presets", Json::array()}};
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
                                  {"largest_micro", optional_json(memory.largest_micro)},
                                  {"largest_rank", optional_json(memory.largest_rank)}});
  }
  for (const PresetMemory& preset : report.presets) {
    Json entries = Json::array();
    for (const PresetMemory::Entry& entry : preset.optimizers)
      entries.push_back({{"optimizer", to_string(entry.kind)},
                         {"bytes_at_micro_1", entry.smallest.bytes},
                         {"largest_micro", optional_json(entry.largest_micro)}});
    json["presets"].push_back({{"name", preset.name}, {"parameters", preset.parameters}, {"optimizers", entries}});
  }
  return json;
}

std::string memory_tables(const MemoryReport& report) {
  Table table;
  table.line(fmt::format("{}: {} parameters, sequences of {}, {} micro-batch{} of {} a step on each of {} rank{}\n",
                         report.name, human_count(static_cast<double>(report.model.parameter_count())),
                         report.micro.seq_len, report.micro_batches, report.micro_batches == 1 ? "" : "es",
                         report.micro.sequences, report.ranks, report.ranks == 1 ? "" : "s"));
  role_rows(table, report);
  micro_rows(table, report);
  preset_rows(table, report);
  return table.text();
}

}  // namespace kiln

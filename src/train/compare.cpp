#include "train/compare.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/files.h"
#include "base/text.h"
#include "train/model_files.h"

namespace kiln {

Config comparison_config(const Config& base, const CompareRun& run) {
  Config config = with_optimizer(base, run.kind);
  if (!run.overrides.empty()) config = parse_config(to_yaml(config), std::string(to_string(run.kind)), run.overrides);
  if (run.peak_lr > 0) config.schedule.peak_lr = run.peak_lr;
  if (run.rank) config.optimizer.rank = *run.rank;
  if (run.seed) config.run.seed = *run.seed;
  config.run.dir = run.dir.string();
  config.run.name = to_string(run.kind);
  validate(config);
  return config;
}

std::uint64_t state_bytes(const Config& config) {
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(optimizer_options(config));
  std::uint64_t total = 0;
  for (const Parameter& parameter : llama_parameters(model_config(config), DType::f32).parameters)
    total += optimizer->state_bytes(parameter);
  return total;
}

std::int64_t rank_within(const Config& base, OptimizerKind kind, std::uint64_t bytes) {
  Config config = with_optimizer(base, kind);
  const auto takes = [&](std::int64_t rank) {
    config.optimizer.rank = rank;
    return state_bytes(config);
  };
  check(takes(1) <= bytes, "{}: its states take {} bytes at rank 1, more than the {} that all shall have",
        to_string(kind), takes(1), bytes);
  std::int64_t rank = 1;
  for (std::int64_t next = 8; next <= model_config(config).hidden && takes(next) <= bytes; next += 8) rank = next;
  return rank;
}

const CompareRow* CompareMember::best() const {
  const CompareRow* found = nullptr;
  for (const CompareRow& row : grid)
    if (!row.diverged && (found == nullptr || row.last_loss < found->last_loss)) found = &row;
  return found;
}

std::vector<double> CompareMember::losses() const {
  std::vector<double> list;
  if (const CompareRow* row = best()) list.push_back(row->last_loss);
  for (const CompareRow& row : seeds)
    if (!row.diverged) list.push_back(row.last_loss);
  return list;
}

double model_loss(const Config& config, const std::filesystem::path& model, Communicator& communicator) {
  const ModelWeights weights = load_model(model);
  const Dataset data(config.data.valid, config.data.seq_len, weights.config().vocab, config.run.seed);
  Evaluator evaluator(weights, config.eval.micro.value_or(micro_batch(config, communicator.size()).sequences),
                      config.data.seq_len);
  return evaluator.run(data, samples_for_tokens(data, config.eval.tokens), communicator).loss;
}

void write_summary(const CompareRow& row) {
  Json json{{"name", row.name},
            {"optimizer", row.name},
            {"parameters", row.summary.parameters},
            {"state_bytes", row.summary.state_bytes},
            {"memory_bytes", row.summary.memory_bytes},
            {"tokens_per_s", row.summary.tokens_per_s},
            {"tokens", row.summary.at.tokens},
            {"peak_lr", row.peak_lr},
            {"rank", row.rank},
            {"seed", row.seed},
            {"final_valid_loss", row.last_loss},
            {"last_valid_loss", row.last_loss}};
  if (std::isfinite(row.merged_loss)) json["merged_valid_loss"] = row.merged_loss;
  write_text_atomic(row.run_dir / "summary.json", json.dump(2) + "\n");
}

std::string compare_table(const std::vector<CompareRow>& rows) {
  std::string text =
      fmt::format("{:<12} {:>8} {:>5} {:>5} {:>12} {:>14} {:>12} {:>12} {:>12} {:>10}\n", "optimizer", "peak lr",
                  "rank", "seed", "valid loss", "state bytes", "tokens/s", "last", "merged", "gain");
  for (const CompareRow& row : rows) {
    const bool merged = std::isfinite(row.merged_loss);
    const std::string loss = row.diverged ? "diverged" : fmt::format("{:.4f}", row.last_loss);
    text +=
        fmt::format("{:<12} {:>8} {:>5} {:>5} {:>12} {:>14} {:>12.0f} {:>12} {:>12} {:>10}\n", row.name, row.peak_lr,
                    row.rank > 0 ? std::to_string(row.rank) : "-", row.seed, loss, row.summary.state_bytes,
                    row.summary.tokens_per_s, loss, merged ? fmt::format("{:.4f}", row.merged_loss) : "-",
                    merged ? fmt::format("{:+.4f}", row.last_loss - row.merged_loss) : "-");
  }
  return text;
}

std::string members_table(const std::vector<CompareMember>& members) {
  std::string text = fmt::format("{:<12} {:>8} {:>5} {:>14} {:>12} {:>6} {:>10} {:>12}\n", "optimizer", "best lr",
                                 "rank", "state bytes", "valid loss", "seeds", "+-", "perplexity");
  for (const CompareMember& member : members) {
    const CompareRow* best = member.best();
    if (best == nullptr) {
      text += fmt::format("{:<12} every run diverged\n", member.name);
      continue;
    }
    const std::vector<double> losses = member.losses();
    const auto [least, most] = std::ranges::minmax(losses);
    const double mean = std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(losses.size());
    text +=
        fmt::format("{:<12} {:>8} {:>5} {:>14} {:>12.4f} {:>6} {:>10} {:>12.2f}\n", member.name, best->peak_lr,
                    best->rank > 0 ? std::to_string(best->rank) : "-", best->summary.state_bytes, mean, losses.size(),
                    losses.size() > 1 ? fmt::format("{:.4f}", (most - least) / 2) : "-", std::exp(mean));
  }
  return text;
}

}  // namespace kiln

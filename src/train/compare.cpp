#include "train/compare.h"

#include <cmath>

#include "base/files.h"
#include "base/text.h"
#include "train/model_files.h"

namespace kiln {

Config comparison_config(const Config& base, OptimizerKind kind, double peak_lr, const std::filesystem::path& run_dir) {
  Config config = with_optimizer(base, kind);
  if (peak_lr > 0) config.schedule.peak_lr = peak_lr;
  config.run.dir = run_dir.string();
  config.run.name = to_string(kind);
  validate(config);
  return config;
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
            {"final_valid_loss", row.last_loss},
            {"last_valid_loss", row.last_loss}};
  if (std::isfinite(row.merged_loss)) json["merged_valid_loss"] = row.merged_loss;
  write_text_atomic(row.run_dir / "summary.json", json.dump(2) + "\n");
}

std::string compare_table(const std::vector<CompareRow>& rows) {
  std::string text = fmt::format("{:<12} {:>8} {:>12} {:>14} {:>12} {:>12} {:>12} {:>10}\n", "optimizer", "peak lr",
                                 "valid loss", "state bytes", "tokens/s", "last", "merged", "gain");
  for (const CompareRow& row : rows) {
    const bool merged = std::isfinite(row.merged_loss);
    text += fmt::format("{:<12} {:>8} {:>12.4f} {:>14} {:>12.0f} {:>12.4f} {:>12} {:>10}\n", row.name, row.peak_lr,
                        row.last_loss, row.summary.state_bytes, row.summary.tokens_per_s, row.last_loss,
                        merged ? fmt::format("{:.4f}", row.merged_loss) : "-",
                        merged ? fmt::format("{:+.4f}", row.last_loss - row.merged_loss) : "-");
  }
  return text;
}

}  // namespace kiln

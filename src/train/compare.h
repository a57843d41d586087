#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "dist/communicator.h"
#include "train/config.h"
#include "train/trainer.h"

namespace kiln {

/// One run of a comparison: what it takes instead of the configuration's.
struct CompareRun {
  OptimizerKind kind = OptimizerKind::adamw;
  double peak_lr = 0;                    // 0: the configuration's
  std::optional<std::int64_t> rank{};    // likewise
  std::optional<std::uint64_t> seed{};   // likewise
  std::vector<std::string> overrides{};  // section.key=value, of this optimizer alone
  std::filesystem::path dir{};
};

/// What became of it.
struct CompareRow {
  std::string name;
  std::filesystem::path run_dir{};
  double peak_lr = 0;
  std::int64_t rank = 0;  // 0: the member has none
  std::uint64_t seed = 0;
  bool diverged = false;
  TrainSummary summary{};
  double last_loss = 0;    // validation loss of the last weights
  double merged_loss = 0;  // of the merged snapshots; NaN when there are none
  std::size_t snapshots = 0;
};

/// One optimizer of a comparison: its runs over a grid of learning rates, and those of the best rate with other seeds.
struct CompareMember {
  std::string name;
  std::vector<CompareRow> grid, seeds;

  /// The grid's run with the lowest validation loss; nullptr when all diverged.
  const CompareRow* best() const;
  /// Validation losses of the best rate, over all seeds.
  std::vector<double> losses() const;
};

/// The configuration of one run: everything of `base` but what `run` says. A usage Error names what does not fit.
Config comparison_config(const Config& base, const CompareRun& run);

/// Bytes of an optimizer's states, in the sizes that files have.
std::uint64_t state_bytes(const Config& config);
/// The largest rank of this member whose states take at most `bytes`, a multiple of 8 where it reaches 8. A usage Error
/// when rank 1 takes more.
std::int64_t rank_within(const Config& base, OptimizerKind kind, std::uint64_t bytes);

/// Validation loss of a model directory on a configuration's validation data. Collective.
double model_loss(const Config& config, const std::filesystem::path& model, Communicator& communicator);

/// Writes RUN/summary.json, which reports read.
void write_summary(const CompareRow& row);

/// The table of a comparison, as text: a row a run.
std::string compare_table(const std::vector<CompareRow>& rows);
/// A row an optimizer: the best learning rate, and with several seeds the mean and half the range of its losses.
std::string members_table(const std::vector<CompareMember>& members);

}  // namespace kiln

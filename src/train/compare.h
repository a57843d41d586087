#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "dist/communicator.h"
#include "train/config.h"
#include "train/trainer.h"

namespace kiln {

/// One run of a comparison and what became of it.
struct CompareRow {
  std::string name;
  std::filesystem::path run_dir;
  double peak_lr = 0;
  TrainSummary summary;
  double last_loss = 0;    // validation loss of the last weights
  double merged_loss = 0;  // of the merged snapshots; NaN when there are none
  std::size_t snapshots = 0;
};

/// The configuration of one run: everything of `base` but the optimizer, its learning rate when > 0, and the directory.
Config comparison_config(const Config& base, OptimizerKind kind, double peak_lr, const std::filesystem::path& run_dir);

/// Validation loss of a model directory on a configuration's validation data. Collective.
double model_loss(const Config& config, const std::filesystem::path& model, Communicator& communicator);

/// Writes RUN/summary.json, which reports read.
void write_summary(const CompareRow& row);

/// The table of a comparison, as text.
std::string compare_table(const std::vector<CompareRow>& rows);

}  // namespace kiln

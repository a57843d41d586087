#include <CLI/CLI.hpp>
#include <cmath>
#include <iostream>
#include <memory>

#include "apps/commands.h"
#include "apps/failure.h"
#include "base/files.h"
#include "base/log.h"
#include "base/signals.h"
#include "core/parallel.h"
#include "io/checkpoint.h"
#include "merge/streaming_merge.h"
#include "report/html.h"
#include "train/compare.h"

namespace kiln {
namespace {

struct CompareArguments {
  std::string config;
  std::vector<std::string> overrides, optimizers{"adamw", "galore", "fira"};
  std::vector<double> peak_lr;
  std::filesystem::path out = "runs/compare";
  std::size_t merge_last = 10;
  bool quiet = false;
};

/// Merges the newest snapshots of a run and evaluates the result. Collective; NaN with fewer than two snapshots.
void merge_and_evaluate(const Config& config, std::size_t merge_last, Communicator& communicator, CompareRow& row) {
  row.last_loss = row.summary.valid_loss.value_or(std::nan(""));
  row.merged_loss = std::nan("");
  std::vector<std::filesystem::path> snapshots = list_checkpoints(row.run_dir / "snapshots");
  if (snapshots.size() > merge_last)
    snapshots.erase(snapshots.begin(), snapshots.end() - static_cast<std::ptrdiff_t>(merge_last));
  row.snapshots = snapshots.size();
  if (row.snapshots < 2) return;
  const std::filesystem::path merged = row.run_dir / "merged";
  if (communicator.rank() == 0) {
    MergeOptions options;
    options.inputs = snapshots;
    options.output = merged;
    merge_checkpoints(options);
  }
  communicator.barrier();
  row.merged_loss = model_loss(config, merged, communicator);
}

/// The learning rate of the i-th optimizer: its own, the one for all, or 0 for the configuration's.
double peak_lr_of(const CompareArguments& a, std::size_t i) {
  if (a.peak_lr.empty()) return 0;
  check(a.peak_lr.size() == 1 || a.peak_lr.size() == a.optimizers.size(),
        "--peak-lr: {} values, expected one, or one for each of the {} optimizers", a.peak_lr.size(),
        a.optimizers.size());
  return a.peak_lr.size() == 1 ? a.peak_lr.front() : a.peak_lr[i];
}

/// Trains, merges and evaluates one optimizer. Collective.
CompareRow compare_one(const CompareArguments& a, const Config& base, std::size_t i, Communicator& communicator) {
  CompareRow row;
  row.name = a.optimizers[i];
  row.run_dir = a.out / row.name;
  const Config config = comparison_config(base, parse_optimizer_kind(row.name), peak_lr_of(a, i), row.run_dir);
  row.peak_lr = config.schedule.peak_lr;
  if (communicator.rank() == 0 && !a.quiet) log_info("{} at peak lr {}", row.name, row.peak_lr);
  {
    Trainer trainer(config, communicator, {.quiet = a.quiet});
    trainer.resume_latest();
    row.summary = trainer.run();
  }
  if (row.summary.stopped_by != 0) throw CLI::RuntimeError(128 + row.summary.stopped_by);
  merge_and_evaluate(config, a.merge_last, communicator, row);
  if (communicator.rank() == 0) write_summary(row);
  return row;
}

void run(const CompareArguments& a) {
  const auto communicator = make_communicator();
  const Config base = load_config(a.config, a.overrides);
  set_thread_count(rank_threads(base));
  install_stop_signals();
  // Before the first trains for an hour: whether all of them can.
  for (std::size_t i = 0; i < a.optimizers.size(); ++i)
    check_supported(
        comparison_config(base, parse_optimizer_kind(a.optimizers[i]), peak_lr_of(a, i), a.out / a.optimizers[i]));
  std::vector<CompareRow> rows;
  try {
    for (std::size_t i = 0; i < a.optimizers.size(); ++i) rows.push_back(compare_one(a, base, i, *communicator));
  } catch (const CLI::Error&) {
    throw;  // a clean stop by a signal
  } catch (const std::exception& e) {
    abort_ranks(e, *communicator);
  }
  if (communicator->rank() != 0) return;
  std::vector<std::filesystem::path> runs;
  for (const CompareRow& row : rows) runs.push_back(row.run_dir);
  write_report(runs, a.out / "report.html", "Comparison of optimizers");
  const std::string table = compare_table(rows);
  write_text_atomic(a.out / "table.txt", table);
  std::cout << '\n' << table << "\nPlots: " << (a.out / "report.html").string() << '\n';
}

}  // namespace

void add_compare_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("compare", "Train several optimizers on the same data and budget");
  auto a = std::make_shared<CompareArguments>();
  command->add_option("config", a->config, "YAML configuration")->required();
  command->add_option("overrides", a->overrides, "section.key=value");
  command->add_option("--optimizers", a->optimizers, "values of optimizer.kind, comma-separated")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--peak-lr", a->peak_lr, "one for all, or one for each")->delimiter(',');
  command->add_option("--merge-last", a->merge_last, "snapshots in the merge")->capture_default_str();
  command->add_option("--out", a->out, "directory of the runs, table.txt and report.html")->capture_default_str();
  command->add_flag("--quiet", a->quiet, "no progress line");
  command->footer("Example:\n  mpirun -n 2 kiln compare configs/quickstart.yaml --optimizers adamw,fira");
  command->callback([a] { run(*a); });
}

}  // namespace kiln

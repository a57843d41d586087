#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>

#include "apps/commands.h"
#include "apps/failure.h"
#include "base/files.h"
#include "base/log.h"
#include "base/signals.h"
#include "base/text.h"
#include "core/parallel.h"
#include "io/checkpoint.h"
#include "merge/streaming_merge.h"
#include "report/html.h"
#include "train/compare.h"
#include "train/divergence.h"

namespace kiln {
namespace {

struct CompareArguments {
  std::string config;
  std::vector<std::string> overrides, optimizers{"adamw", "galore", "fira"}, own;
  std::vector<double> peak_lr, grid{1.0};
  std::vector<std::uint64_t> seeds;
  std::string state_budget;
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

/// The learning rate of the i-th optimizer: its own, the one for all, or the configuration's.
double peak_lr_of(const CompareArguments& a, const Config& base, std::size_t i) {
  if (a.peak_lr.empty()) return base.schedule.peak_lr;
  check(a.peak_lr.size() == 1 || a.peak_lr.size() == a.optimizers.size(),
        "--peak-lr: {} values, expected one, or one for each of the {} optimizers", a.peak_lr.size(),
        a.optimizers.size());
  return a.peak_lr.size() == 1 ? a.peak_lr.front() : a.peak_lr[i];
}

/// --for NAME:key=value, of one optimizer.
std::vector<std::string> own_overrides(const CompareArguments& a, const std::string& optimizer) {
  std::vector<std::string> list;
  for (const std::string& text : a.own) {
    const std::size_t colon = text.find(':');
    const std::string name = text.substr(0, colon);
    check(colon != std::string::npos && std::ranges::find(a.optimizers, name) != a.optimizers.end(),
          "--for {}: expected NAME:section.key=value with an optimizer of --optimizers", text);
    if (name == optimizer) list.push_back(text.substr(colon + 1));
  }
  return list;
}

/// What the i-th optimizer takes, but for learning rate, seed and directory.
CompareRun member_run(const CompareArguments& a, const Config& base, std::size_t i) {
  CompareRun run{.kind = parse_optimizer_kind(a.optimizers[i]), .overrides = own_overrides(a, a.optimizers[i])};
  if (a.state_budget.empty()) return run;
  run.dir = a.out;
  const Config own = comparison_config(base, run);
  const bool first = a.state_budget == "first";
  const std::uint64_t budget =
      first ? state_bytes(comparison_config(base, {.kind = parse_optimizer_kind(a.optimizers.front()),
                                                   .overrides = own_overrides(a, a.optimizers.front()),
                                                   .dir = a.out}))
            : parse_bytes(a.state_budget, "--state-budget");
  if (has_rank(run.kind) && !(first && i == 0)) run.rank = rank_within(own, run.kind, budget);
  const std::uint64_t takes = run.rank ? 0 : state_bytes(own);
  check(takes <= budget, "--state-budget: the states of {} take {} bytes, more than {}, and it has no rank to lower",
        a.optimizers[i], takes, budget);
  return run;
}

/// Runs keep their directories when nothing is varied but the optimizer.
std::filesystem::path run_directory(const CompareArguments& a, const CompareRun& run, double lr, std::uint64_t seed) {
  std::string name(to_string(run.kind));
  if (a.grid.size() > 1) name += fmt::format("-lr{}", lr);
  if (a.seeds.size() > 1) name += fmt::format("-seed{}", seed);
  return a.out / name;
}

/// Trains, merges and evaluates one run. Collective.
CompareRow compare_one(const CompareArguments& a, const Config& base, CompareRun run, Communicator& communicator) {
  run.dir = run_directory(a, run, run.peak_lr, run.seed.value_or(base.run.seed));
  const Config config = comparison_config(base, run);
  CompareRow row{.name = std::string(to_string(run.kind)),
                 .run_dir = run.dir,
                 .peak_lr = config.schedule.peak_lr,
                 .rank = has_rank(run.kind) ? config.optimizer.rank : 0,
                 .seed = config.run.seed};
  if (communicator.rank() == 0 && !a.quiet)
    log_info("{} at peak lr {}, seed {}", row.name, row.peak_lr, config.run.seed);
  try {
    Trainer trainer(config, communicator, {.quiet = a.quiet});
    trainer.resume_latest();
    row.summary = trainer.run();
  } catch (const Divergence& divergence) {  // the same on every rank; a grid may reach that far
    if (communicator.rank() == 0) log_warning("{}", divergence.what());
    row.diverged = true;
    row.last_loss = row.merged_loss = std::nan("");
    return row;
  }
  if (row.summary.stopped_by != 0) throw CLI::RuntimeError(128 + row.summary.stopped_by);
  merge_and_evaluate(config, a.merge_last, communicator, row);
  if (communicator.rank() == 0) write_summary(row);
  return row;
}

/// Every learning rate of one optimizer with the first seed, then the best one with the others. Collective.
CompareMember compare_member(const CompareArguments& a, const Config& base, std::size_t i, Communicator& communicator) {
  CompareMember member{.name = a.optimizers[i], .grid = {}, .seeds = {}};
  CompareRun run = member_run(a, base, i);
  if (!a.seeds.empty()) run.seed = a.seeds.front();
  for (const double factor : a.grid) {
    run.peak_lr = factor * peak_lr_of(a, base, i);
    member.grid.push_back(compare_one(a, base, run, communicator));
  }
  const CompareRow* best = member.best();
  if (best == nullptr) return member;
  run.peak_lr = best->peak_lr;
  for (std::size_t s = 1; s < a.seeds.size(); ++s) {
    run.seed = a.seeds[s];
    member.seeds.push_back(compare_one(a, base, run, communicator));
  }
  return member;
}

/// Before the first trains for an hour: whether all of them can.
void check_all(const CompareArguments& a, const Config& base) {
  check(!a.optimizers.empty() && !a.grid.empty(), "compare: --optimizers and --lr-grid need at least one value");
  for (const double factor : a.grid) check(factor > 0, "--lr-grid {}: expected a positive factor", factor);
  check((a.grid.size() == 1 && a.seeds.size() < 2) || !base.data.valid.empty(),
        "compare: --lr-grid and --seeds compare validation losses; set data.valid");
  for (std::size_t i = 0; i < a.optimizers.size(); ++i) {
    CompareRun run = member_run(a, base, i);
    run.peak_lr = peak_lr_of(a, base, i);
    run.dir = a.out / a.optimizers[i];
    check_supported(comparison_config(base, run));
  }
}

void write_results(const CompareArguments& a, const std::vector<CompareMember>& members) {
  std::vector<std::filesystem::path> runs;
  std::vector<CompareRow> rows;
  for (const CompareMember& member : members)
    for (const auto* list : {&member.grid, &member.seeds})
      for (const CompareRow& row : *list) {
        rows.push_back(row);
        if (!row.diverged) runs.push_back(row.run_dir);
      }
  std::string table = compare_table(rows);
  if (rows.size() > members.size()) table += '\n' + members_table(members);
  std::filesystem::create_directories(a.out);
  write_text_atomic(a.out / "table.txt", table);
  std::cout << '\n' << table;
  if (!runs.empty()) {
    write_report(runs, a.out / "report.html", "Comparison of optimizers");
    std::cout << "\nPlots: " << (a.out / "report.html").string() << '\n';
  }
  for (const CompareMember& member : members)
    if (member.best() == nullptr) fail(ExitCode::diverged, "{}: every run diverged; lower --peak-lr", member.name);
}

void run(const CompareArguments& a) {
  const auto communicator = make_communicator();
  const Config base = load_config(a.config, a.overrides);
  set_thread_count(rank_threads(base));
  install_stop_signals();
  check_all(a, base);
  std::vector<CompareMember> members;
  try {
    for (std::size_t i = 0; i < a.optimizers.size(); ++i) members.push_back(compare_member(a, base, i, *communicator));
  } catch (const CLI::Error&) {
    throw;  // a clean stop by a signal
  } catch (const std::exception& e) {
    abort_ranks(e, *communicator);
  }
  if (communicator->rank() == 0) write_results(a, members);
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
  command->add_option("--lr-grid", a->grid, "factors of the peak lr, each a run; the best by validation loss counts")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--seeds", a->seeds, "values of run.seed: the first for the grid, the others for the best lr")
      ->delimiter(',');
  command->add_option("--for", a->own, "NAME:section.key=value, for one optimizer; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--state-budget", a->state_budget,
                      "`first`, or bytes such as 300MiB: low-rank optimizers take the largest rank whose states fit");
  command->add_option("--merge-last", a->merge_last, "snapshots in the merge")->capture_default_str();
  command->add_option("--out", a->out, "directory of the runs, table.txt and report.html")->capture_default_str();
  command->add_flag("--quiet", a->quiet, "no progress line");
  command->footer(
      "Example:\n  mpirun -n 2 kiln compare configs/quickstart.yaml --optimizers adamw,fira "
      "--lr-grid 0.5,1,2 --seeds 1,2,3");
  command->callback([a] { run(*a); });
}

}  // namespace kiln

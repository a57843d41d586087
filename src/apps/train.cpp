#include <CLI/CLI.hpp>
#include <iostream>

#include "apps/commands.h"
#include "apps/failure.h"
#include "apps/rescue.h"
#include "base/log.h"
#include "base/signals.h"
#include "core/parallel.h"
#include "train/trainer.h"

namespace kiln {
namespace {

struct TrainArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::string resume = "auto", init_from;
  bool quiet = false, help_config = false;
};

void resume_run(Trainer& trainer, const TrainArguments& arguments, bool first_rank) {
  if (arguments.resume != "auto" && arguments.resume != "none") return trainer.resume(arguments.resume);
  if (arguments.resume == "auto" && trainer.resume_latest()) return;
  if (arguments.init_from.empty()) return;
  trainer.initialise_from(arguments.init_from);
  if (trainer.initialise_states_from(arguments.init_from) && first_rank)
    log_info("optimizer states of {}", arguments.init_from);
}

/// Trains to the end, over as many rescues as the configuration allows.
TrainSummary train(const Config& config, const TrainArguments& arguments, Communicator& communicator) {
  std::filesystem::path rescued;  // where a rescue left the run
  while (true) {
    try {
      Trainer trainer(config, communicator, {.quiet = arguments.quiet});
      if (rescued.empty())
        resume_run(trainer, arguments, communicator.rank() == 0);
      else
        trainer.resume(rescued);
      return trainer.run();
    } catch (const Divergence& divergence) {
      if (config.run.on_divergence == OnDivergence::stop) throw;
      rescued = rescue(config, divergence, communicator);
    }
  }
}

void print_summary(const Config& config, const TrainSummary& summary) {
  fmt::print("{}: step {}, {} tokens, loss {:.4f}{}, {:.0f} tokens/s\n", config.run.name, summary.at.step,
             summary.at.tokens, summary.train_loss,
             summary.valid_loss ? fmt::format(", validation {:.4f}", *summary.valid_loss) : "", summary.tokens_per_s);
}

void run(const TrainArguments& arguments) {
  if (arguments.help_config) {
    std::cout << config_help();
    return;
  }
  check(!arguments.config.empty(), "train: CONFIG.yaml is missing; see configs/ for examples");
  const auto communicator = make_communicator();
  const Config config = load_config(arguments.config, arguments.overrides);
  check_supported(config);
  set_thread_count(rank_threads(config));
  install_stop_signals();
  TrainSummary summary;
  try {
    summary = train(config, arguments, *communicator);
  } catch (const std::exception& e) {
    abort_ranks(e, *communicator);
  }
  if (communicator->rank() == 0 && !arguments.quiet) print_summary(config, summary);
  if (summary.stopped_by != 0) throw CLI::RuntimeError(128 + summary.stopped_by);
}

}  // namespace

void add_train_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("train", "Train a model; the same under mpirun -n N");
  auto arguments = std::make_shared<TrainArguments>();
  command->add_option("config", arguments->config, "YAML configuration");
  command->add_option("overrides", arguments->overrides, "section.key=value");
  command->add_option("--resume", arguments->resume, "auto, none, or a checkpoint directory")->capture_default_str();
  command->add_option(
      "--init-from", arguments->init_from,
      "start from the weights of a model directory, such as a merge, and the optimizer states it holds");
  command->add_flag("--help-config", arguments->help_config, "list every configuration key");
  command->add_flag("--quiet", arguments->quiet, "no progress line");
  command->footer("Example:\n  mpirun -n 2 kiln train configs/quickstart.yaml optimizer.kind=fira");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace kiln

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "apps/commands.h"
#include "base/log.h"
#include "base/text.h"
#include "core/parallel.h"
#include "train/device.h"
#include "train/memory_report.h"

namespace kiln {
namespace {

struct PlanArguments {
  std::string config, budget, device;
  std::vector<std::string> overrides;
  bool json = false;
};

void run(const PlanArguments& arguments) {
  Config config = load_config(arguments.config, arguments.overrides);
  if (!arguments.device.empty()) config.run.device = parse_device(arguments.device);
  const OptimizerKind configured = config.optimizer.kind;
  config.optimizer.kind = OptimizerKind::adamw;  // every kind is reported, also those that the device cannot run
  check_supported(config);
  config.optimizer.kind = configured;
  const std::unique_ptr<Backend> backend = open_planning_device(config.run.device);
  if (!arguments.budget.empty()) config.memory.budget = parse_bytes(arguments.budget, "--budget");
  const auto communicator = make_communicator();
  set_thread_count(rank_threads(config));  // the workspace of some ops grows with the threads
  MemoryReport report;
  try {
    report = memory_report(config, *communicator, *backend);
  } catch (const Error& e) {
    if (communicator->size() == 1) throw;
    log_line(LogLevel::error, e.what());
    communicator->abort(static_cast<int>(e.code()));
  }
  if (communicator->rank() != 0) return;
  std::fputs((arguments.json ? to_json(report).dump(2) + "\n" : memory_tables(report)).c_str(), stdout);
}

}  // namespace

void add_plan_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("plan", "Memory of every optimizer, before anything is allocated");
  const auto arguments = std::make_shared<PlanArguments>();
  command->add_option("CONFIG", arguments->config, "YAML configuration")->required();
  command->add_option("overrides", arguments->overrides, "section.key=value");
  command->add_option("--budget", arguments->budget, "Bytes of one device, such as 24GiB; else memory.budget");
  command->add_option("--device", arguments->device, "auto, cpu or cuda, which needs no GPU; else run.device");
  command->add_flag("--json", arguments->json, "Print exact bytes as JSON");
  command->footer("Example:\n  kiln plan configs/llama_60m_fira.yaml --budget 8GiB optimizer.rank=64");
  add_quiet_flag(*command);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace kiln

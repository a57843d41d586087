#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "apps/commands.h"
#include "base/log.h"
#include "base/text.h"
#include "core/parallel.h"
#include "train/memory_report.h"

namespace kiln {
namespace {

struct PlanArguments {
  std::string config, budget;
  std::vector<std::string> overrides;
  bool json = false;
};

void run(const PlanArguments& arguments) {
  Config config = load_config(arguments.config, arguments.overrides);
  check_supported(config);
  if (!arguments.budget.empty()) config.memory.budget = parse_bytes(arguments.budget, "--budget");
  const auto communicator = make_communicator();
  set_thread_count(rank_threads(config));  // the workspace of some ops grows with the threads
  MemoryReport report;
  try {
    report = memory_report(config, *communicator);
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
  command->add_flag("--json", arguments->json, "Print exact bytes as JSON");
  command->footer("Example:\n  kiln plan configs/llama_60m_fira.yaml --budget 8GiB optimizer.rank=64");
  add_quiet_flag(*command);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace kiln

#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "apps/commands.h"
#include "base/log.h"
#include "report/html.h"

namespace kiln {
namespace {

struct ReportOptions {
  std::vector<std::string> run_dirs;
  std::string out = "report.html";
  std::string title = "kiln report";
};

}  // namespace

void add_report_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("report", "Writes one self-contained page with plots of runs");
  const auto options = std::make_shared<ReportOptions>();
  command->add_option("RUN_DIR", options->run_dirs, "Run directories that `kiln train` wrote")->required();
  command->add_option("--out", options->out, "The page to write")->capture_default_str();
  command->add_option("--title", options->title, "Heading of the page")->capture_default_str();
  command->footer("Example:\n  kiln report runs/fira60m runs/adamw60m --out report.html");
  add_quiet_flag(*command);
  command->callback([options] {
    write_report({options->run_dirs.begin(), options->run_dirs.end()}, options->out, options->title);
    log_info("wrote {}: {} run{}", options->out, options->run_dirs.size(), options->run_dirs.size() == 1 ? "" : "s");
  });
}

}  // namespace kiln

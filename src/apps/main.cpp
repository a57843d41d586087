#include <CLI/CLI.hpp>
#include <filesystem>
#include <iostream>
#include <new>

#include "apps/commands.h"
#include "apps/failure.h"
#include "base/error.h"
#include "base/log.h"

namespace kiln {

void add_quiet_flag(CLI::App& command) {
  command.add_flag_callback(
      "--quiet", [] { set_log_level(LogLevel::warning); }, "warnings and errors only");
}

namespace {

int run(int argc, char** argv) {
  CLI::App app("kiln: LLaMA pre-training under a memory budget");
  app.set_version_flag("--version", "kiln 0.1.0");
  app.require_subcommand(1);
  for (const auto add :
       {add_train_command, add_plan_command, add_compare_command, add_merge_command, add_predict_command,
        add_eval_command, add_generate_command, add_tokenize_command, add_import_command, add_export_command,
        add_report_command, add_bench_command, add_doctor_command})
    add(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::RuntimeError& e) {  // a command that chose its exit code
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(ExitCode::usage);
  }
  return 0;
}

}  // namespace
}  // namespace kiln

int main(int argc, char** argv) {
  try {
    return kiln::run(argc, argv);
  } catch (const std::exception& e) {
    const kiln::Failure failure = kiln::failure_of(e);
    kiln::log_line(kiln::LogLevel::error, failure.message);
    return static_cast<int>(failure.code);
  }
}

#pragma once

namespace CLI {
class App;
}

namespace kiln {

// Each command is one file, apps/NAME.cpp: it adds a subcommand with its options, an example in the footer and --quiet,
// and a callback that does the work and throws kiln::Error on failure.
void add_train_command(CLI::App& app);
void add_plan_command(CLI::App& app);
void add_compare_command(CLI::App& app);
void add_merge_command(CLI::App& app);
void add_predict_command(CLI::App& app);
void add_eval_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_tokenize_command(CLI::App& app);
void add_import_command(CLI::App& app);
void add_export_command(CLI::App& app);
void add_report_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_doctor_command(CLI::App& app);

/// Adds --quiet, which drops progress and information; warnings and errors stay.
void add_quiet_flag(CLI::App& command);

}  // namespace kiln

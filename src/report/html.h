#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "report/run_data.h"

namespace kiln {

/// One self-contained page (no script, no external resource): a table of the runs, plots of training and validation
/// loss, learning rate, gradient norm and speed against tokens or time, optimizer bytes, and each configuration.
std::string html_report(const std::string& title, std::vector<RunData> runs);

/// `kiln report`: loads every run directory and writes the page to `out`, atomically. A usage Error when `dirs` is
/// empty; a data or resource Error otherwise.
void write_report(const std::vector<std::filesystem::path>& dirs, const std::filesystem::path& out,
                  const std::string& title);

}  // namespace kiln

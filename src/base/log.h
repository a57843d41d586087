#pragma once
#include <fmt/format.h>

#include <string_view>

namespace kiln {

enum class LogLevel { info, warning, error };

/// Writes one line to standard error, through spdlog. Thread-safe.
void log_line(LogLevel level, std::string_view text);

/// Lines below `level` are dropped from now on (`--quiet` is `warning`).
void set_log_level(LogLevel level);

template <typename... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::info, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::warning, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace kiln

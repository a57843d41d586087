#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace kiln {

/// What went wrong, as the process reports it to the shell (128+n, for a signal after a clean save, is made in apps).
enum class ExitCode { ok = 0, usage = 2, data = 3, resource = 4, diverged = 5 };

/// The one exception of the project: one sentence that names the file, key or tensor, what was found, what was
/// expected, and what to do. apps/main.cpp prints it and leaves with `code()`.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

/// Throws Error: `fail(ExitCode::data, "{}: truncated at {} bytes", path, n)`.
template <typename... Args>
[[noreturn]] void fail(ExitCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

/// Throws a usage Error unless `condition` holds; the arguments are formatted only then.
template <typename... Args>
void check(bool condition, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) [[unlikely]]
    throw Error(ExitCode::usage, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace kiln

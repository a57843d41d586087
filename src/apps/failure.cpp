#include "apps/failure.h"

#include <cstdlib>
#include <filesystem>
#include <new>

#include "base/log.h"

namespace kiln {

Failure failure_of(const std::exception& error) {
  if (const auto* ours = dynamic_cast<const Error*>(&error)) return {ours->code(), ours->what()};
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr)
    return {ExitCode::resource, "out of memory; use a smaller model or micro-batch"};
  if (const auto* file = dynamic_cast<const std::filesystem::filesystem_error*>(&error)) {
    const bool full = file->code() == std::errc::no_space_on_device;
    return {full ? ExitCode::resource : ExitCode::data, file->what()};
  }
  return {ExitCode::data, error.what()};
}

void abort_ranks(const std::exception& error, Communicator& communicator) {
  const Failure failure = failure_of(error);
  log_line(LogLevel::error, failure.message);
  communicator.abort(static_cast<int>(failure.code));
  std::_Exit(static_cast<int>(failure.code));  // for compilers that do not see that a virtual call never returns
}

}  // namespace kiln

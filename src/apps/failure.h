#pragma once
#include <exception>
#include <string>

#include "base/error.h"
#include "dist/communicator.h"

namespace kiln {

/// What an exception means to the shell.
struct Failure {
  ExitCode code;
  std::string message;
};
Failure failure_of(const std::exception& error);

/// Reports an error that may be this rank's alone and ends every rank with its exit code, since the others would wait
/// for this one for ever.
[[noreturn]] void abort_ranks(const std::exception& error, Communicator& communicator);

}  // namespace kiln

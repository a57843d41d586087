#pragma once
#include "base/error.h"
#include "train/run_position.h"

namespace kiln {

/// A run that must not go on from here: a loss or gradient norm that is not finite, whose update changed nothing
/// (with memory.update: in_backward, nothing from the gradient on that was not finite), or a
/// spike of the loss. Thrown by every rank at the same step; exit code 5 unless somebody rescues the run.
class Divergence : public Error {
 public:
  Divergence(const std::string& message, const RunPosition& at) : Error(ExitCode::diverged, message), at_(at) {}
  /// After the step that showed it, with its batch drawn.
  const RunPosition& at() const { return at_; }

 private:
  RunPosition at_;
};

}  // namespace kiln

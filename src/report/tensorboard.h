#pragma once
#include <cstdint>
#include <filesystem>
#include <string_view>

#include "report/append_file.h"
#include "report/event_record.h"
#include "report/metrics.h"

namespace kiln {

/// Writes scalars to an event file that TensorBoard reads. Every writer begins a file of its own; when the directory
/// holds event files of before, the new one tells readers to drop their points after `resume_step`.
class TensorBoardWriter {
 public:
  /// Makes the directory when needed. `resume_step` 0 hides all that was there. A data or resource Error otherwise.
  TensorBoardWriter(const std::filesystem::path& dir, std::int64_t resume_step);

  /// One write() call, no allocation. A resource Error when the disk is full.
  void scalar(std::string_view tag, double value, std::int64_t step);
  /// Each field of a step, under "train/" ("valid/loss" for the validation loss). "train/rescue" is the
  /// rescue's number, at the first step behind it.
  void step(const StepMetrics& metrics);

 private:
  EventRecord record_;
  AppendFile file_;
};

}  // namespace kiln

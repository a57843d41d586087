#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

#include "report/fixed_text.h"
#include "report/metrics.h"

namespace kiln {

struct ProgressOptions {
  std::int64_t first_step = 0;  ///< steps done before this process (a resumed run)
  std::int64_t total_steps = 0;
  std::int64_t plain_steps = 10;  ///< without a terminal: a line when this many steps have passed ...
  double plain_seconds = 10;      ///< ... and this much time, so at most one per interval
  int fd = 2;                     ///< where to write: standard error
  // Found from the descriptor and the environment (TERM, NO_COLOR, LC_ALL, LC_CTYPE, LANG) unless given.
  std::optional<bool> terminal{};
  std::optional<bool> colour{};
  std::optional<bool> unicode{};
  std::optional<int> width{};     ///< columns; otherwise asked of the terminal at every drawing
  double (*clock_s)() = nullptr;  ///< monotonic seconds; the steady clock unless given
};

/// The live line of a training run: bar, percentage, step, time left, loss, learning rate, gradient norm, tokens/s, MFU
/// and memory. On a terminal it is redrawn in place, at most 20 times a second, and what does not fit is left out, the
/// least important first. Elsewhere it is one plain line now and then, and for every validation.
/// Does not allocate after construction; a failing write is ignored. Not thread-safe.
class ProgressLine {
 public:
  explicit ProgressLine(const ProgressOptions& options);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(const StepMetrics& metrics);
  /// One line of text above the live line.
  void message(std::string_view text);
  /// Draws the last state and ends the line. Later calls do nothing.
  void finish();

 private:
  void draw();
  void print_plain();
  int columns() const;
  double seconds_left() const;

  ProgressOptions options_;
  bool terminal_ = false, colour_ = false, unicode_ = false;
  double start_s_ = 0, drawn_s_ = 0;
  std::int64_t drawn_step_ = -1;  // -1: nothing drawn yet
  bool started_ = false, finished_ = false;
  StepMetrics last_{};
  double valid_loss_ = 0;  // of the last validation; NaN before the first
  FixedText<2048> line_;
};

}  // namespace kiln

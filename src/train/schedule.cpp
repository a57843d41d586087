#include "train/schedule.h"

#include <algorithm>

namespace kiln {
namespace {

/// Steps over which the rate falls.
std::int64_t decay_length(const ScheduleOptions& s) {
  switch (s.kind) {
    case ScheduleKind::constant:
      return 0;
    case ScheduleKind::wsd:
      return s.decay_steps;
    case ScheduleKind::linear:
    case ScheduleKind::cosine:
      return s.total_steps - s.warmup_steps;
  }
  return 0;
}

}  // namespace

double learning_rate(const ScheduleOptions& s, std::int64_t step) {
  if (step <= s.warmup_steps) return s.peak_lr * static_cast<double>(step) / static_cast<double>(s.warmup_steps);
  const std::int64_t length = decay_length(s), into = step - (s.total_steps - length);
  if (length <= 0 || into <= 0) return s.peak_lr;
  const double progress = std::min(1.0, static_cast<double>(into) / static_cast<double>(length));
  const DecayShape shape = s.kind == ScheduleKind::cosine   ? DecayShape::cosine
                           : s.kind == ScheduleKind::linear ? DecayShape::linear
                                                            : s.decay_shape;
  return s.peak_lr * (s.final_ratio + (1.0 - s.final_ratio) * decay_at(shape, progress));
}

bool in_constant_phase(const ScheduleOptions& s, std::int64_t step) {
  return step >= s.warmup_steps && step <= s.total_steps - decay_length(s);
}

}  // namespace kiln

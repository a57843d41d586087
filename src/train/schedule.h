#pragma once
#include <cstdint>

#include "base/decay_shape.h"

namespace kiln {

enum class ScheduleKind { constant, linear, cosine, wsd };

/// Learning rate by step, counted from 1 to total_steps.
struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak_lr = 1e-3;
  std::int64_t warmup_steps = 0, total_steps = 1000;
  std::int64_t decay_steps = 0;                 // wsd: the last steps, which anneal
  DecayShape decay_shape = DecayShape::linear;  // wsd
  double final_ratio = 0.1;                     // of peak_lr, reached at the last step exactly
};

/// Warm-up rises linearly from 0 (not taken) to peak_lr at step warmup_steps. What follows is measured over the steps
/// after warm-up, so that linear and cosine reach final_ratio * peak_lr at step total_steps. WSD (warm-up, stable,
/// decay: Hu et al. 2024, arXiv:2404.06395) holds peak_lr until total_steps - decay_steps. 1-sqrt: Haegele et al. 2024.
double learning_rate(const ScheduleOptions& schedule, std::int64_t step);

/// Whether `step` ran at peak_lr after warm-up and before any decay.
bool in_constant_phase(const ScheduleOptions& schedule, std::int64_t step);

}  // namespace kiln

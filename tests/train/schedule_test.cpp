#include "train/schedule.h"

#include <cmath>

#include "catch.h"

namespace kiln {
namespace {

ScheduleOptions options(ScheduleKind kind) {
  return {.kind = kind, .peak_lr = 0.5, .warmup_steps = 10, .total_steps = 110, .decay_steps = 20, .final_ratio = 0.1};
}

TEST_CASE("warm-up rises from 0 to the peak and is subtracted from what follows") {
  for (const ScheduleKind kind :
       {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine, ScheduleKind::wsd}) {
    const ScheduleOptions s = options(kind);
    CHECK(learning_rate(s, 1) == Approx(0.05));
    CHECK(learning_rate(s, 10) == Approx(0.5));
  }
  CHECK(learning_rate(options(ScheduleKind::linear), 60) == Approx(0.5 * 0.55));  // half of the 100 steps after it
  CHECK(learning_rate(options(ScheduleKind::cosine), 60) == Approx(0.5 * 0.55));
}

TEST_CASE("every decay reaches its end at the last step, and stays there") {
  for (const ScheduleKind kind : {ScheduleKind::linear, ScheduleKind::cosine, ScheduleKind::wsd}) {
    CHECK(learning_rate(options(kind), 110) == Approx(0.05).epsilon(1e-12));
    CHECK(learning_rate(options(kind), 111) == Approx(0.05).epsilon(1e-12));
  }
  CHECK(learning_rate(options(ScheduleKind::constant), 110) == 0.5);
}

TEST_CASE("WSD holds the peak, then anneals in the shape asked for") {
  ScheduleOptions s = options(ScheduleKind::wsd);
  CHECK(learning_rate(s, 90) == 0.5);
  CHECK(learning_rate(s, 91) < 0.5);
  CHECK(learning_rate(s, 100) == Approx(0.5 * 0.55));
  s.decay_shape = DecayShape::one_minus_sqrt;
  CHECK(learning_rate(s, 95) == Approx(0.5 * (0.1 + 0.9 * 0.5)));
  s.decay_shape = DecayShape::cosine;
  CHECK(learning_rate(s, 95) == Approx(0.5 * (0.1 + 0.9 * (0.5 + std::sqrt(0.125)))));
}

TEST_CASE("the constant phase lies between warm-up and decay") {
  const ScheduleOptions s = options(ScheduleKind::wsd);
  CHECK_FALSE(in_constant_phase(s, 9));
  CHECK(in_constant_phase(s, 10));
  CHECK(in_constant_phase(s, 90));
  CHECK_FALSE(in_constant_phase(s, 91));
  CHECK(in_constant_phase(options(ScheduleKind::constant), 110));
  CHECK_FALSE(in_constant_phase(options(ScheduleKind::cosine), 50));
}

TEST_CASE("no warm-up means the peak from the first step") {
  ScheduleOptions s = options(ScheduleKind::constant);
  s.warmup_steps = 0;
  CHECK(learning_rate(s, 1) == 0.5);
}

}  // namespace
}  // namespace kiln

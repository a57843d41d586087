#pragma once
#include <cstdint>

#include "core/tensor.h"
#include "optim/optimizer.h"

namespace kiln {

/// Which side of G [m,n] is projected: the shorter one.
enum class ProjectionSide {
  right,  // m >= n: Q [n,r], R = G Q [m,r]
  left,   // m <  n: Q [m,r], R = G' Q [n,r]
};
ProjectionSide projection_side(const Shape& shape);

/// When the subspace of one matrix is replaced. All matrices start cold at step 1; afterwards one is refreshed at the
/// steps with (step - 1) % interval == offset. Staggered, matrix i of N has the offset i * interval / N, so that no
/// step carries every refresh; else 0.
struct RefreshSchedule {
  std::int64_t interval = 200, offset = 0;
};
RefreshSchedule refresh_schedule(const Parameter& parameter, std::int64_t interval, bool stagger);
/// Steps count from 1.
constexpr bool refresh_due(const RefreshSchedule& schedule, std::int64_t step) {
  return step == 1 || (step - 1) % schedule.interval == schedule.offset;
}
/// How many refreshes there were after the cold start, this step's included: 0, 1, 2...
constexpr std::int64_t refresh_epoch(const RefreshSchedule& schedule, std::int64_t step) {
  return (step - 1 + (schedule.interval - schedule.offset) % schedule.interval) / schedule.interval;
}

struct RefreshOptions {
  ProjectorKind kind = ProjectorKind::power;
  std::uint64_t seed = 1, stream = 0;  // of the cold start
  bool cold = false;                   // no basis yet
  int passes = 3;                      // of power
};

/// Replaces the orthonormal basis `q` [min(m,n), r] by one of the dominant subspace of `g`; both f32 or f64.
///
/// svd    the top r singular vectors, through the eigenvectors of the f64 Gram matrix of the shorter side; each
///        vector's component of largest magnitude is positive, so that moments kept across a refresh have a defined
///        sign
/// power  `passes` times Q <- orth(G (G' Q)), warm-started from the old basis and kept aligned with it (orthonormal.h);
///        from cold, a randomised range finder with oversampling (Halko, Martinsson & Tropp 2011) and a Rayleigh-Ritz
///        rotation
/// A gradient that is not finite leaves `q` as it was, and returns false. A warm power refresh allocates nothing: its
/// workspace holds refresh_workspace_bytes(). The others allocate.
bool refresh_projector(const Tensor& g, const Tensor& q, const RefreshOptions& options, void* workspace);
std::size_t refresh_workspace_bytes(const Shape& shape, std::int64_t rank, DType dtype);

}  // namespace kiln

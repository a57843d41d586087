#pragma once
#include <cstdint>

#include "core/tensor.h"
#include "optim/optimizer.h"

namespace kiln {

/// Which side of G [m,n] is projected: the shorter one.
enum class ProjectionSide {
  right,  // m >= n: Q [n,r], R = G Q [m,r]
  left,   // m <  n: Q [m,r], R = Q' G [r,n]
};
ProjectionSide projection_side(const Shape& shape);

struct RefreshOptions {
  ProjectorKind kind = ProjectorKind::power;
  std::uint64_t seed = 1, stream = 0;  // of the cold start
  bool cold = false;                   // no basis yet
};

/// Replaces the orthonormal basis `q` [min(m,n), r] by one of the dominant subspace of `g`.
///
/// svd    the top r singular vectors, through the eigenvectors of the f64 Gram matrix of the shorter side; each
/// vector's
///        component of largest magnitude is positive, so that moments kept across a refresh have a defined sign
/// power  two passes of Q <- orth(G (G' Q)), warm-started from the old basis and kept aligned with it; from cold, a
///        randomised range finder with oversampling (Halko, Martinsson & Tropp 2011) and a Rayleigh-Ritz rotation
/// A gradient that is not finite leaves `q` as it was. Allocates; refreshes are rare.
void refresh_projector(const Tensor& g, const Tensor& q, const RefreshOptions& options);

}  // namespace kiln

#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "graph/parameter.h"
#include "kernels/low_rank.h"
#include "kernels/state_access.cuh"

/// What the kernels of the low-rank optimizers share.
namespace kiln::cuda {

/// A step whose gradient norm is not finite changes nothing.
__device__ inline bool skipped(const double* scalars) {
  return !isfinite(scalars[static_cast<int>(Scalar::grad_norm)]);
}

/// Philox's stream of a random projection that changes every `every` steps: optim/apollo.h.
__device__ inline std::uint64_t projection_stream(const LowRankMatrix& t, const double* scalars, int every) {
  const auto done = static_cast<std::int64_t>(scalars[static_cast<int>(Scalar::step)]) - 1;
  return t.stream + static_cast<std::uint64_t>((done + (every - t.refresh_offset) % every) / every);
}

/// Two numbers as bf16, the first in the lower half.
__device__ inline std::uint32_t pack2(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

}  // namespace kiln::cuda

#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "graph/parameter.h"
#include "kernels/low_rank.h"

/// What the kernels of the low-rank optimizers share.
namespace kiln::cuda {

/// A step whose gradient norm is not finite changes nothing.
__device__ inline bool skipped(const double* scalars) {
  return !isfinite(scalars[static_cast<int>(Scalar::grad_norm)]);
}

/// Two numbers as bf16, the first in the lower half.
__device__ inline std::uint32_t pack2(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

}  // namespace kiln::cuda

#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "graph/parameter.h"
#include "kernels/low_rank.h"
#include "kernels/vector.cuh"

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

/// Eight neighbouring elements on their way, f32 or bf16 as they are stored.
template <typename T>
struct Eight {
  uint4 bits[sizeof(T) / 2];
  __device__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) bits[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ Float8 values() const {
    if constexpr (sizeof(T) == 2) {
      return unpack({bits[0]});
    } else {
      const uint4 a = bits[0], b = bits[1];
      return {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
               __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
    }
  }
};

}  // namespace kiln::cuda

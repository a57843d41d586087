#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/row_order.h"

namespace kiln::cuda {

using bf16 = __nv_bfloat16;

/// The place of a block among rows taken in this order.
__device__ inline std::int64_t ordered_block(RowOrder order) {
  return order == RowOrder::ascending ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
}

/// Eight bf16 in one 16-byte access.
struct alignas(16) Bf16x8 {
  uint4 bits;
};
struct Float8 {
  float v[8];
};

__device__ inline Bf16x8 load8(const bf16* p) { return {*reinterpret_cast<const uint4*>(p)}; }
__device__ inline void store8(bf16* p, Bf16x8 x) { *reinterpret_cast<uint4*>(p) = x.bits; }
/// For data that nobody reads again soon.
__device__ inline Bf16x8 load8_streaming(const bf16* p) { return {__ldcs(reinterpret_cast<const uint4*>(p))}; }
__device__ inline void store8_streaming(bf16* p, Bf16x8 x) { __stcs(reinterpret_cast<uint4*>(p), x.bits); }

__device__ inline Float8 unpack(Bf16x8 x) {
  Float8 out;
  const std::uint32_t words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[2 * i] = __uint_as_float(words[i] << 16);
    out.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return out;
}

/// Round to nearest even.
__device__ inline Bf16x8 pack(const Float8& x) {
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x.v[2 * i], x.v[2 * i + 1]);
    words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  return {make_uint4(words[0], words[1], words[2], words[3])};
}

/// Waits for the `threads` threads that share `slot` of kSlots, at barrier 1 + slot; each number is a constant of its
/// instruction.
template <int kSlots, int kSlot = 0>
__device__ void wait_for_slot(int slot, int threads) {
  static_assert(kSlots <= 15, "a block has 16 barriers, and barrier 0 is __syncthreads()'s");
  if constexpr (kSlot < kSlots) {
    if (slot != kSlot) return wait_for_slot<kSlots, kSlot + 1>(slot, threads);
    asm volatile("bar.sync %0, %1;" ::"n"(kSlot + 1), "r"(threads) : "memory");
  }
}

/// Sum over the 32 lanes, in a fixed order, in every lane.
template <typename T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

/// Sum over a block of whole warps, in a fixed order, in every thread. `scratch` holds one T a warp.
template <typename T>
__device__ inline T block_sum(T x, T* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}
__device__ inline float block_max(float x, float* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

}  // namespace kiln::cuda

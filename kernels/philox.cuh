#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace kiln::cuda {

/// Philox4x32-10 as base/rng.h has it: four words of random bits at counter (n, stream) under a key.
__device__ inline uint4 philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t n) {
  uint4 c = make_uint4(static_cast<std::uint32_t>(n), static_cast<std::uint32_t>(n >> 32),
                       static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32));
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const std::uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// Standard normal (Box-Muller) from four words, as base/rng.h has it but in f32.
__device__ inline float normal(uint4 words) {
  const float u = (static_cast<float>(words.y >> 8) + 1.0f) * 0x1p-24f;  // (0, 1]
  const float v = static_cast<float>(words.w >> 8) * 0x1p-24f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

}  // namespace kiln::cuda

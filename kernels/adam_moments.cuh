#pragma once
#include "kernels/split_master.cuh"
#include "optim/state_codec.h"

/// How a thread of Adam's kernel reads and writes eight neighbouring elements of the two moments.
namespace kiln::cuda {

/// The moments of one parameter.
struct MomentPointers {
  void *first, *second;                       // f32, bf16 or codes of 8 bits
  float *first_scale, *second_scale;          // of each kStateBlock codes
  std::uint64_t first_stream, second_stream;  // of stochastic rounding, as StateStore says
};

/// f32, or bf16 rounded stochastically.
template <typename State>
struct MomentAccess {
  __device__ static void load(const MomentPointers& p, std::int64_t i, Float8& m, Float8& v) {
    m = load_state(static_cast<const State*>(p.first) + i);
    v = load_state(static_cast<const State*>(p.second) + i);
  }
  __device__ static void store(const MomentPointers& p, std::int64_t i, const Float8& m, const Float8& v,
                               std::uint64_t key) {
    store_state(static_cast<State*>(p.first) + i, m, key, p.first_stream, i / 8);
    store_state(static_cast<State*>(p.second) + i, v, key, p.second_stream, i / 8);
  }
};

/// StateMap of optim/state_codec.h for both moments.
struct CodeMaps {
  StateMap first, second;
};

/// Codes of 8 bits. A warp has a whole block, whose largest magnitude it finds together. The maps lie in shared memory.
template <>
struct MomentAccess<std::uint8_t> {
  const float *values[2], *thresholds[2];

  /// By all `threads` of a block; `shared` has room for both maps.
  __device__ MomentAccess(const CodeMaps& maps, float* shared, int threads) {
    const float* from = reinterpret_cast<const float*>(&maps);
    for (int i = static_cast<int>(threadIdx.x); i < 1024; i += threads) shared[i] = from[i];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2; ++k) values[k] = shared + 512 * k, thresholds[k] = shared + 512 * k + 256;
  }
  __device__ void load(const MomentPointers& p, std::int64_t i, Float8& m, Float8& v) const {
    m = decode(values[0], p.first, p.first_scale, i);
    v = decode(values[1], p.second, p.second_scale, i);
  }
  __device__ void store(const MomentPointers& p, std::int64_t i, const Float8& m, const Float8& v,
                        std::uint64_t) const {
    encode(thresholds[0], m, p.first, p.first_scale, i);
    encode(thresholds[1], v, p.second, p.second_scale, i);
  }

 private:
  __device__ static Float8 decode(const float* map, const void* codes, const float* scales, std::int64_t i) {
    const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const std::uint8_t*>(codes) + i);
    const float scale = scales[i / kStateBlock];
    Float8 out;
#pragma unroll
    for (int k = 0; k < 8; ++k) out.v[k] = map[(k < 4 ? bits.x : bits.y) >> 8 * (k % 4) & 0xffu] * scale;
    return out;
  }
  __device__ static void encode(const float* limits, const Float8& x, void* codes, float* scales, std::int64_t i) {
    float largest = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(x.v[k]));
    largest = warp_max(largest);
    const float divisor = largest > 0 ? largest : 1.0f;
    std::uint32_t words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 8; ++k) words[k / 4] |= code(limits, x.v[k] / divisor) << 8 * (k % 4);
    *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(codes) + i) = make_uint2(words[0], words[1]);
    if (threadIdx.x % 32 == 0) scales[i / kStateBlock] = largest;
  }
  /// The number of thresholds below x, the last of which is infinite.
  __device__ static std::uint32_t code(const float* limits, float x) {
    int at = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
      if (limits[at + step - 1] < x) at += step;
    return static_cast<std::uint32_t>(at);
  }
};

}  // namespace kiln::cuda

#pragma once
#include "kernels/split_master.cuh"
#include "kernels/state_pointer.h"

/// How a thread reads and writes eight neighbouring elements of an optimizer's state. Neighbouring threads have
/// neighbouring eights, lane 0 of a warp the first of a block of kStateBlock: so a warp has a whole block of codes,
/// whose largest magnitude it finds together.
namespace kiln::cuda {

static_assert(kStateBlock == 32 * 8);

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
/// Eight codes and the scale of their block.
template <>
struct Eight<std::uint8_t> {
  uint2 codes;
  float scale;
};

__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 load4(const bf16* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16),
                     __uint_as_float(x.y & 0xffff0000u));
}

/// f32 or bf16.
template <typename State>
struct StateAccess {
  static constexpr int kSharedFloats = 1;

  __device__ explicit StateAccess(const CodeMaps*) {}
  __device__ StateAccess(const CodeMaps*, float*, int) {}
  __device__ static Eight<State> load(const StatePointer& p, std::int64_t at) {
    Eight<State> x;
    x.load(static_cast<const State*>(p.data) + at);
    return x;
  }
  /// Whether nothing is left to do for this thread from element `at` on.
  __device__ static bool done(std::int64_t at, std::int64_t n) { return at >= n; }
  __device__ static float4 load_four(const StatePointer& p, std::int64_t at, StateValues) {
    return load4(static_cast<const State*>(p.data) + at);
  }
  __device__ static Float8 values(const Eight<State>& x, StateValues) { return x.values(); }
  /// The state from its element `first` on, a multiple of kStateBlock where there are codes.
  __device__ static StatePointer from(const StatePointer& p, std::int64_t first) {
    return {static_cast<State*>(p.data) + first, nullptr, p.stream};
  }
  /// bf16 rounded by the draws of `key`; p is the state from its element `first` on.
  template <typename I>
  __device__ static void store(const StatePointer& p, I at, const Float8& x, StateValues, std::uint64_t key,
                               bool = true, std::int64_t first = 0) {
    store_state(static_cast<State*>(p.data) + at, x, key, p.stream, first / 8 + at / 8);
  }
  /// bf16 rounded to nearest; returns what is stored.
  __device__ static Float8 store_nearest(const StatePointer& p, std::int64_t at, const Float8& x, StateValues,
                                         bool = true) {
    if constexpr (sizeof(State) == 2) {
      const Bf16x8 half = pack(x);
      store8(static_cast<bf16*>(p.data) + at, half);
      return unpack(half);
    } else {
      store_whole(static_cast<float*>(p.data) + at, x);
      return x;
    }
  }
  /// What becomes of numbers that are stored and read again, where that takes no draws.
  __device__ static Float8 again(const Float8& x, StateValues, bool) { return x; }
};

/// Codes of 8 bits. All lanes of a warp store together; `inside` says whose elements there are, the first lane's among
/// them. The others' values count for nothing.
template <>
struct StateAccess<std::uint8_t> {
  static constexpr int kSharedFloats = sizeof(CodeMaps) / sizeof(float);
  const float* maps;  // CodeMaps

  __device__ explicit StateAccess(const CodeMaps* global) : maps(reinterpret_cast<const float*>(global)) {}
  /// By all `threads` of a block: the maps then lie in shared memory, kSharedFloats of it.
  __device__ StateAccess(const CodeMaps* global, float* shared, int threads) : maps(shared) {
    const float* from = reinterpret_cast<const float*>(global);
    for (int i = static_cast<int>(threadIdx.x); i < kSharedFloats; i += threads) shared[i] = from[i];
    __syncthreads();
  }
  __device__ static Eight<std::uint8_t> load(const StatePointer& p, std::int64_t at) {
    return {*reinterpret_cast<const uint2*>(static_cast<const std::uint8_t*>(p.data) + at),
            p.scales[static_cast<std::uint64_t>(at) / kStateBlock]};
  }
  /// Lanes past the end stay with their warp.
  __device__ static bool done(std::int64_t at, std::int64_t n) { return at - threadIdx.x % 32 * 8 >= n; }
  __device__ float4 load_four(const StatePointer& p, std::int64_t at, StateValues kind) const {
    const std::uint32_t codes = *reinterpret_cast<const std::uint32_t*>(static_cast<const std::uint8_t*>(p.data) + at);
    const float *map = map_of(kind), scale = p.scales[static_cast<std::uint64_t>(at) / kStateBlock];
    auto value = [&](int k) { return map[codes >> 8 * k & 0xffu] * scale; };
    return make_float4(value(0), value(1), value(2), value(3));
  }
  __device__ Float8 values(const Eight<std::uint8_t>& x, StateValues kind) const {
    const float* map = map_of(kind);
    Float8 out;
#pragma unroll
    for (int k = 0; k < 8; ++k) out.v[k] = map[(k < 4 ? x.codes.x : x.codes.y) >> 8 * (k % 4) & 0xffu] * x.scale;
    return out;
  }
  __device__ static StatePointer from(const StatePointer& p, std::int64_t first) {
    return {static_cast<std::uint8_t*>(p.data) + first, p.scales + first / kStateBlock, 0};
  }
  __device__ void store(const StatePointer& p, std::int64_t at, const Float8& x, StateValues kind, std::uint64_t,
                        bool inside = true, std::int64_t = 0) const {
    put(p, at, encode(x, kind, inside), inside);
  }
  __device__ Float8 store_nearest(const StatePointer& p, std::int64_t at, const Float8& x, StateValues kind,
                                  bool inside = true) const {
    const Eight<std::uint8_t> coded = encode(x, kind, inside);
    put(p, at, coded, inside);
    return values(coded, kind);
  }
  __device__ Float8 again(const Float8& x, StateValues kind, bool inside) const {
    return values(encode(x, kind, inside), kind);
  }

 private:
  __device__ const float* map_of(StateValues kind) const { return maps + (kind == StateValues::positive ? 512 : 0); }
  __device__ Eight<std::uint8_t> encode(const Float8& x, StateValues kind, bool inside) const {
    const float* limits = map_of(kind) + 256;
    float largest = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) largest = fmaxf(largest, fabsf(x.v[k]));
    largest = warp_max(inside ? largest : 0.0f);
    const float divisor = largest > 0 ? largest : 1.0f;
    std::uint32_t words[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 8; ++k) words[k / 4] |= code(limits, x.v[k] / divisor) << 8 * (k % 4);
    return {make_uint2(words[0], words[1]), largest};
  }
  __device__ static void put(const StatePointer& p, std::int64_t at, const Eight<std::uint8_t>& x, bool inside) {
    if (!inside) return;
    *reinterpret_cast<uint2*>(static_cast<std::uint8_t*>(p.data) + at) = x.codes;
    if (threadIdx.x % 32 == 0) p.scales[static_cast<std::uint64_t>(at) / kStateBlock] = x.scale;
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

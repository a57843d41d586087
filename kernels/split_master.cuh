#pragma once
#include "kernels/philox.cuh"
#include "kernels/vector.cuh"

/// Weights that an optimizer writes: the upper half of an f32 master with the lower 16 bits beside it, or bf16 rounded
/// stochastically.
namespace kiln::cuda {

/// The upper half is the master rounded to the nearest bf16, so the lower half counts as signed.
__device__ inline float joined(std::uint16_t high, std::uint16_t low) {
  return __uint_as_float((static_cast<std::uint32_t>(high) << 16) +
                         static_cast<std::uint32_t>(static_cast<std::int16_t>(low)));
}
__device__ inline std::uint16_t upper_half(float x) {
  return static_cast<std::uint16_t>((__float_as_uint(x) + 0x8000u) >> 16);
}
__device__ inline std::uint16_t lower_half(float x) { return static_cast<std::uint16_t>(__float_as_uint(x)); }

/// bf16 of `x`, up with the probability of the part that is cut off; of `random` the lower 16 bits count.
__device__ inline std::uint16_t round_stochastically(float x, std::uint32_t random) {
  return static_cast<std::uint16_t>((__float_as_uint(x) + (random & 0xffffu)) >> 16);
}

/// Draws are a function of (seed, step, stream, element).
__device__ inline std::uint64_t rounding_seed(std::uint64_t seed, double step) {
  return seed ^ static_cast<std::uint64_t>(step) * 0x9E3779B97F4A7C15u;
}

/// Eight neighbouring numbers of an optimizer's state, f32 or bf16 rounded stochastically.
__device__ inline Float8 load_state(const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ inline Float8 load_state(const bf16* p) { return unpack(load8(p)); }
/// f32 takes no draws.
__device__ inline void store_whole(float* p, const Float8& x) {
  reinterpret_cast<float4*>(p)[0] = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
__device__ inline void store_state(float* p, const Float8& x, std::uint64_t, std::uint64_t, std::int64_t) {
  store_whole(p, x);
}
__device__ inline uint4 round_stochastically(const Float8& x, uint4 random) {
  auto two = [&](int i, std::uint32_t bits) {
    return round_stochastically(x.v[i], bits) | static_cast<std::uint32_t>(round_stochastically(x.v[i + 1], bits >> 16))
                                                    << 16;
  };
  return make_uint4(two(0, random.x), two(2, random.y), two(4, random.z), two(6, random.w));
}
__device__ inline void store_state(bf16* p, const Float8& x, std::uint64_t key, std::uint64_t stream,
                                   std::int64_t element) {
  *reinterpret_cast<uint4*>(p) = round_stochastically(x, philox(key, stream, static_cast<std::uint64_t>(element)));
}

/// Eight neighbouring weights.
struct Master8 {
  Float8 value;

  /// `low` may be null: bf16 alone.
  __device__ Master8(const std::uint16_t* w, const std::uint16_t* low, std::int64_t at)
      : Master8(*reinterpret_cast<const uint4*>(w + at),
                low == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(low + at)) {}
  __device__ Master8(uint4 high, uint4 rest) {
    auto one = [](std::uint32_t h, std::uint32_t l, float& first, float& second) {
      first = joined(static_cast<std::uint16_t>(h), static_cast<std::uint16_t>(l));
      second = joined(static_cast<std::uint16_t>(h >> 16), static_cast<std::uint16_t>(l >> 16));
    };
    one(high.x, rest.x, value.v[0], value.v[1]);
    one(high.y, rest.y, value.v[2], value.v[3]);
    one(high.z, rest.z, value.v[4], value.v[5]);
    one(high.w, rest.w, value.v[6], value.v[7]);
  }
  __device__ void store(std::uint16_t* w, std::uint16_t* low, std::int64_t at, std::uint64_t seed,
                        std::uint64_t stream) const {
    if (low == nullptr) {
      *reinterpret_cast<uint4*>(w + at) =
          round_stochastically(value, philox(seed, stream, static_cast<std::uint64_t>(at)));
      return;
    }
    auto high = [&](int i) { return pair(upper_half(value.v[i]), upper_half(value.v[i + 1])); };
    auto rest = [&](int i) { return pair(lower_half(value.v[i]), lower_half(value.v[i + 1])); };
    *reinterpret_cast<uint4*>(w + at) = make_uint4(high(0), high(2), high(4), high(6));
    *reinterpret_cast<uint4*>(low + at) = make_uint4(rest(0), rest(2), rest(4), rest(6));
  }

 private:
  __device__ static std::uint32_t pair(std::uint16_t first, std::uint16_t second) {
    return first | static_cast<std::uint32_t>(second) << 16;
  }
};

}  // namespace kiln::cuda

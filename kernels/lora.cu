#include "kernels/lora.h"

#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/split_master.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements of a group
constexpr int kSelectThreads = 1024, kBins = 256;

__device__ std::int64_t step_number(const LoraMatrix& t) {
  return static_cast<std::int64_t>(t.scalars[static_cast<int>(Scalar::step)]);
}
/// LoraUpdate::draws, refresh_epoch and LoraUpdate::rewarmed.
__device__ bool draws(const LoraMatrix& t, std::int64_t step) {
  return step == 1 || (t.restart && (step - 1) % t.every == t.offset);
}
__device__ std::int64_t epoch_of(const LoraMatrix& t, std::int64_t step) {
  return t.restart ? (step - 1 + (t.every - t.offset) % t.every) / t.every : 0;
}
__device__ double rewarmed(const LoraMatrix& t, std::int64_t step) {
  if (!t.restart || t.rewarm < 1 || epoch_of(t, step) == 0) return 1.0;
  const std::int64_t since = (step - 1 - t.offset) % t.every;
  return fmin(1.0, static_cast<double>(since + 1) / static_cast<double>(t.rewarm));
}

/// Uniform in [0, 1), as base/rng.h has it.
__device__ double uniform(uint4 words) {
  const std::uint64_t bits = static_cast<std::uint64_t>(words.y) << 32 | words.x;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

/// The number of `rank` (from 0) among n numbers that are not negative, by eight bits of theirs at a time. Counts are
/// whole numbers, whose order of addition is free.
template <typename State>
__device__ float select(const StatePointer& values, const StateAccess<State>& access, std::int64_t n,
                        std::int64_t rank) {
  __shared__ std::uint32_t counts[kBins], found;
  __shared__ std::int64_t rest;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  std::uint32_t known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kBins) counts[thread] = 0;
    __syncthreads();
    for (std::int64_t first = 0; first < n; first += kSelectThreads * kEach) {
      const std::int64_t at = first + thread * kEach;
      const Float8 x = at < n ? access.values(access.load(values, at), StateValues::positive) : Float8{};
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const std::uint32_t bits = __float_as_uint(x.v[k]), bin = bits >> shift & 0xffu;
        const bool counted = at < n && (shift == 24 || bits >> (shift + 8) == known >> (shift + 8));
        const std::uint32_t lanes = __ballot_sync(0xffffffffu, counted);
        if (!counted) continue;
        const std::uint32_t same = __match_any_sync(lanes, bin);
        if (lane == __ffs(static_cast<int>(same)) - 1)
          atomicAdd(&counts[bin], static_cast<std::uint32_t>(__popc(same)));
      }
    }
    __syncthreads();
    if (thread == 0) {
      std::int64_t left = shift == 24 ? rank : rest;
      std::uint32_t bin = 0;
      while (bin + 1 < kBins && left >= counts[bin]) left -= counts[bin++];
      found = known | bin << shift;
      rest = left;
    }
    __syncthreads();
    known = found;
  }
  return __uint_as_float(known);
}

template <typename State>
__global__ void __launch_bounds__(kSelectThreads) thresholds_of(LoraMatrix t) {
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  const std::int64_t step = step_number(t);
  if (skipped(t.scalars) || step == 1 || !draws(t, step)) return;
  const StateAccess<State> access(t.maps, code_maps, kSelectThreads);
  const bool of_b = blockIdx.x == 1;
  const std::int64_t n = static_cast<std::int64_t>(t.r) * (of_b ? t.m : t.n);
  const float least = select(t.moments[of_b][1], access, n, t.pruned[of_b]);
  if (threadIdx.x == 0) t.thresholds[of_b] = least;
}

/// Elements of A with room to the end of its last block, so that those of B start with a warp.
__host__ __device__ std::int64_t blocks_of_a(const LoraMatrix& t) {
  return (static_cast<std::int64_t>(t.r) * t.n + kStateBlock - 1) / kStateBlock * kStateBlock;
}

/// Eights of A, then of B: where this thread's lie. A thread that is not inside has the first.
struct Place {
  bool of_b, inside;
  std::int64_t at;    // element of A or B
  std::int64_t left;  // of B: element of `left`, its part before the step
  __device__ explicit Place(const LoraMatrix& t) {
    const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
    const std::int64_t of_a = blocks_of_a(t);
    of_b = first >= of_a;
    at = of_b ? first - of_a : first;
    inside = at < static_cast<std::int64_t>(t.r) * (of_b ? t.m : t.n);
    if (!inside) at = 0;
    left = of_b ? at / t.r * 2 * t.r + at % t.r : 0;
  }
};

__device__ void store_half(std::uint16_t* to, const Float8& x) { *reinterpret_cast<uint4*>(to) = pack(x).bits; }

/// Eight neighbours of A, drawn; zero in padding.
__device__ Float8 drawn(const LoraMatrix& t, std::int64_t at, std::int64_t step) {
  const std::int64_t row = at / t.n, column = at % t.n;
  const std::uint64_t stream = t.stream + static_cast<std::uint64_t>(epoch_of(t, step));
  const double bound = 1.0 / sqrt(static_cast<double>(t.own_n));
  Float8 x;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const auto element = static_cast<std::uint64_t>(row * t.own_n + column + k);
    const double u = 2.0 * uniform(philox(t.seed, stream, element)) - 1.0;
    x.v[k] = column + k < t.own_n ? static_cast<float>(u * bound) : 0.0f;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads) begin_of(LoraMatrix t) {
  if (skipped(t.scalars)) return;
  const Place place(t);
  if (!place.inside) return;
  const std::int64_t step = step_number(t);
  const bool due = draws(t, step);
  float* const to = (place.of_b ? t.b : t.a) + place.at;
  const Float8 x = !due ? load_state(to) : place.of_b ? Float8{} : drawn(t, place.at, step);
  if (due) store_whole(to, x);
  store_half(place.of_b ? t.left + place.left : t.right + place.at, x);
}

/// G in bf16.
__global__ void __launch_bounds__(kThreads) halve(LoraMatrix t) {
  if (skipped(t.scalars)) return;
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (at < static_cast<std::int64_t>(t.m) * t.n)
    store_half(t.half + at, load_state(static_cast<const float*>(t.g) + at));
}

/// What is the same for all elements, rounded once from f64 as on the CPU.
struct Constants {
  float b1, b2, c1, c2, eps, root, rate, keep, scale;
  bool clear, prune;
  std::uint64_t key;
  __device__ explicit Constants(const LoraMatrix& t) {
    const double step = t.scalars[static_cast<int>(Scalar::step)];
    const std::int64_t number = step_number(t);
    const double lr = t.scalars[static_cast<int>(Scalar::lr)] * rewarmed(t, number);
    b1 = static_cast<float>(t.beta1);
    b2 = static_cast<float>(t.beta2);
    c1 = static_cast<float>(1.0 - t.beta1);
    c2 = static_cast<float>(1.0 - t.beta2);
    eps = static_cast<float>(t.eps);
    root = static_cast<float>(sqrt(1.0 - pow(t.beta2, step)));
    rate = static_cast<float>(lr / (1.0 - pow(t.beta1, step)));
    keep = t.decay ? static_cast<float>(1.0 - lr * t.weight_decay) : 1.0f;
    scale = static_cast<float>(t.scale * t.scalars[static_cast<int>(Scalar::clip_scale)]);
    clear = number == 1;
    prune = number > 1 && draws(t, number);
    key = rounding_seed(t.seed, step);
  }
  Constants() = default;
};

template <typename State>
__global__ void __launch_bounds__(kThreads) adam_of(LoraMatrix t) {
  if (skipped(t.scalars)) return;
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  const StateAccess<State> access(t.maps, code_maps, kThreads);
  __shared__ Constants shared;
  if (threadIdx.x == 0) shared = Constants(t);
  __syncthreads();
  const Constants c = shared;
  const Place place(t);
  if (sizeof(State) > 1 && !place.inside) return;  // of codes it goes along with its warp
  const StatePointer &first = t.moments[place.of_b][0], &second = t.moments[place.of_b][1];
  float* const to = (place.of_b ? t.b : t.a) + place.at;
  const Float8 g = load_state((place.of_b ? t.db : t.da) + place.at);
  const float least = c.clear ? INFINITY : c.prune ? t.thresholds[place.of_b] : 0.0f;
  Float8 m = access.values(access.load(first, place.at), StateValues::any);
  Float8 v = access.values(access.load(second, place.at), StateValues::positive), x = load_state(to), change;
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (!(v.v[k] >= least)) m.v[k] = v.v[k] = 0.0f;
  if (c.prune) {  // the CPU stores what is left: codes then have the scales of that
    m = access.again(m, StateValues::any, place.inside);
    v = access.again(v, StateValues::positive, place.inside);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const float gradient = c.scale * g.v[k];
    m.v[k] = c.b1 * m.v[k] + c.c1 * gradient;
    v.v[k] = c.b2 * v.v[k] + c.c2 * gradient * gradient;
    const float before = x.v[k];
    x.v[k] = c.keep * before - c.rate * (m.v[k] / (sqrtf(v.v[k]) / c.root + c.eps));
    change.v[k] = x.v[k] - before;
  }
  access.store(first, place.at, m, StateValues::any, c.key, place.inside);
  access.store(second, place.at, v, StateValues::positive, c.key, place.inside);
  if (!place.inside) return;
  store_whole(to, x);
  if (place.of_b) return store_half(t.left + place.left + t.r, change);
  store_half(t.right + place.at, change);
  store_half(t.right + static_cast<std::int64_t>(t.r) * t.n + place.at, x);
}

__global__ void __launch_bounds__(kThreads) merge_all(LoraMatrix t) {
  if (skipped(t.scalars)) return;
  const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (at >= static_cast<std::int64_t>(t.m) * t.n) return;
  const float scale = static_cast<float>(t.scale);
  const Float8 product = load_state(t.product + at);
  Master8 w(t.w, t.low, at);
#pragma unroll
  for (int k = 0; k < kEach; ++k) w.value.v[k] += scale * product.v[k];
  w.store(t.w, t.low, at, rounding_seed(t.seed, t.scalars[static_cast<int>(Scalar::step)]), t.stream);
}

unsigned blocks(std::int64_t elements) { return blocks_for(elements, kThreads * kEach); }
std::int64_t elements_of_factors(const LoraMatrix& t) { return blocks_of_a(t) + static_cast<std::int64_t>(t.m) * t.r; }
std::int64_t elements(const LoraMatrix& t) { return static_cast<std::int64_t>(t.m) * t.n; }

}  // namespace

void lora_thresholds(const LoraMatrix& t) {
  launch({"lora_thresholds", 2, kSelectThreads, t.stream_of_work},
         of_states(t.states, thresholds_of<float>, thresholds_of<bf16>, thresholds_of<std::uint8_t>), t);
}

void lora_begin(const LoraMatrix& t) {
  launch({"lora_begin", blocks(elements_of_factors(t)), kThreads, t.stream_of_work}, begin_of, t);
  if (!t.half_gradient) launch({"lora_begin", blocks(elements(t)), kThreads, t.stream_of_work}, halve, t);
}

void lora_adam(const LoraMatrix& t) {
  launch({"lora_adam", blocks(elements_of_factors(t)), kThreads, t.stream_of_work},
         of_states(t.states, adam_of<float>, adam_of<bf16>, adam_of<std::uint8_t>), t);
}

void lora_merge(const LoraMatrix& t) {
  launch({"lora_merge", blocks(elements(t)), kThreads, t.stream_of_work}, merge_all, t);
}

}  // namespace kiln::cuda

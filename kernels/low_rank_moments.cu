#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_one.h"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements of a group
constexpr int kGroups = kMomentsGroups / kThreads;
constexpr float kNormEps = 1e-8f;

struct Moments {
  float b1, b2, c1, c2, eps, inside_square;
  bool residual, pairs;
  std::uint64_t seed;
};

/// Eight elements' new moments; N and R as pairs take R's place. Returns the sums of the squares of N and of R.
__device__ float2 advance(Float8& m, Float8& v, const Float8& r, std::uint32_t (&pairs)[kEach], const Moments& c) {
  float2 sum = make_float2(0, 0);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const float x = r.v[j];
    m.v[j] = c.b1 * m.v[j] + c.c1 * x;
    v.v[j] = c.b2 * v.v[j] + c.c2 * x * x;
    const float n = m.v[j] / (sqrtf(v.v[j]) + c.eps);
    sum.x += n * n;
    sum.y += x * x;
    pairs[j] = pack2(n, x);
  }
  return sum;
}

/// Vectors [piece.row, piece.row + piece.column) of one matrix. A thread loads all that it takes before it stores
/// anything, 192 bytes in f32: device memory then has enough to do. Pieces of codes may be larger, and go in turns of
/// kMomentsGroups. Sums of a vector are added by one warp in a fixed order.
template <typename State>
__global__ void __launch_bounds__(kThreads, 3) moments_of(const LowRankMatrix* matrices, const LowRankPiece* pieces,
                                                          const double* scalars, const CodeMaps* maps, Moments c) {
  constexpr bool kCoded = sizeof(State) == 1;
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  extern __shared__ float2 sums[];  // by group of the piece: squares of N and of R
  if (skipped(scalars)) return;
  const StateAccess<State> access(maps, code_maps, kThreads);
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const int groups_of_vector = t.rank / kEach, vectors = min(piece.column, t.vectors() - piece.row);
  const int groups = vectors * groups_of_vector, thread = static_cast<int>(threadIdx.x);
  const std::int64_t first = static_cast<std::int64_t>(piece.row) * t.rank;
  const StatePointer moment = access.from(t.moment, first), square = access.from(t.square, first);
  float* const projected = t.projected + first;
  const std::uint64_t key = rounding_seed(c.seed, scalars[static_cast<int>(Scalar::step)]);
  for (int turn = 0; turn < (kCoded ? groups : 1); turn += kMomentsGroups) {
    Eight<State> stored_m[kGroups], stored_v[kGroups];
    Float8 r[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      int group = turn + thread + i * kThreads;
      if (access.done(group * kEach, groups * kEach)) break;
      if (kCoded && group >= groups) group = 0;  // beside others of its warp: reads something, writes nothing
      r[i] = load_state(projected + group * kEach);
      stored_m[i] = access.load(moment, group * kEach);
      stored_v[i] = access.load(square, group * kEach);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = turn + thread + i * kThreads;
      if (access.done(group * kEach, groups * kEach)) break;
      const bool inside = !kCoded || group < groups;
      std::uint32_t pairs[kEach];
      Float8 m = access.values(stored_m[i], StateValues::any), v = access.values(stored_v[i], StateValues::positive);
      const float2 sum = advance(m, v, r[i], pairs, c);
      access.store({moment.data, moment.scales, t.moment.stream}, group * kEach, m, StateValues::any, key, inside,
                   first);
      access.store({square.data, square.scales, t.square.stream}, group * kEach, v, StateValues::positive, key, inside,
                   first);
      if (!inside) break;
      sums[group] = sum;
      if (!c.pairs) continue;
      uint4* to = reinterpret_cast<uint4*>(projected + group * kEach);
      to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
  }
  if (!c.residual) return;
  __syncthreads();
  for (int i = thread / 32; i < vectors; i += kThreads / 32) {
    float2 total = make_float2(0, 0);
    for (int group = thread % 32; group < groups_of_vector; group += 32) {
      total.x += sums[i * groups_of_vector + group].x;
      total.y += sums[i * groups_of_vector + group].y;
    }
    total.x = warp_sum(total.x);
    total.y = warp_sum(total.y);
    if (thread % 32 != 0) continue;
    const int vector = piece.row + i;
    const float phi = sqrtf(total.x) / (sqrtf(total.y) + kNormEps);
    t.phi[vector] = phi;
    t.share[vector] = phi * phi * fmaxf(0.0f, t.squares[vector] - c.inside_square * total.y);
  }
}

/// One block a matrix of rank 1, and one phi for all vectors.
template <typename State>
__global__ void __launch_bounds__(1024)
    one_moments_of(const LowRankMatrix* matrices, const double* scalars, const CodeMaps* maps, Moments c) {
  __shared__ double scratch[32];
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  if (skipped(scalars)) return;
  const StateAccess<State> access(maps, code_maps, 1024);
  const LowRankMatrix& t = matrices[blockIdx.x];
  const int vectors = t.vectors(), thread = static_cast<int>(threadIdx.x);
  const std::uint64_t key = rounding_seed(c.seed, scalars[static_cast<int>(Scalar::step)]);
  double direction2 = 0, projected2 = 0;
  for (int group = thread; !access.done(group * kEach, vectors); group += 1024) {
    const bool inside = group * kEach < vectors;
    const int at = inside ? group * kEach : 0;  // 0: beside others of its warp
    Float8 m = access.values(access.load(t.moment, at), StateValues::any);
    Float8 v = access.values(access.load(t.square, at), StateValues::positive);
    std::uint32_t pairs[kEach];
    const float2 sum = advance(m, v, load_state(t.projected + at), pairs, c);
    direction2 += static_cast<double>(inside ? sum.x : 0.0f);
    projected2 += static_cast<double>(inside ? sum.y : 0.0f);
    access.store(t.moment, at, m, StateValues::any, key, inside);
    access.store(t.square, at, v, StateValues::positive, key, inside);
  }
  direction2 = block_sum(direction2, scratch);
  projected2 = block_sum(projected2, scratch);
  const float phi = static_cast<float>(sqrt(direction2) / (sqrt(projected2) + static_cast<double>(kNormEps)));
  for (int i = thread; i < vectors; i += 1024) {
    t.phi[i] = phi;
    t.share[i] = phi * phi * t.squares[i];
  }
}

struct Limit {
  double gamma, outside, beta1, beta2, weight_decay;
  bool scale;  // low_rank_scale follows
};

/// One block a matrix. The limiter: optim/low_rank_adam.h.
__global__ void __launch_bounds__(1024) limit(const LowRankMatrix* matrices, const double* scalars, Limit c) {
  __shared__ double scratch[32];
  if (skipped(scalars)) return;
  const LowRankMatrix t = matrices[blockIdx.x];
  double mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < t.vectors(); i += 1024) mine += static_cast<double>(t.share[i]);
  const double norm = sqrt(block_sum(mine, scratch));
  if (threadIdx.x != 0) return;
  const double previous = static_cast<double>(*t.limiter);
  const double limit = previous > 0 ? fmax(norm / (previous + 1e-8), c.gamma) / c.gamma : 1.0;
  *t.limiter = static_cast<float>(norm / limit);
  *t.factor = static_cast<float>(1.0 / limit);
  if (!c.scale) return;
  const double step = scalars[static_cast<int>(Scalar::step)], lr = scalars[static_cast<int>(Scalar::lr)];
  const double rate = lr * sqrt(1.0 - pow(c.beta2, step)) / (1.0 - pow(c.beta1, step));
  t.factor[1] = static_cast<float>(rate * c.outside * scalars[static_cast<int>(Scalar::clip_scale)] / limit);
  t.factor[2] = t.decay ? static_cast<float>(1.0 - lr * c.weight_decay) : 1.0f;
}

Moments constants(const LowRankStep& s) {
  return {.b1 = static_cast<float>(s.beta1),
          .b2 = static_cast<float>(s.beta2),
          .c1 = static_cast<float>(1.0 - s.beta1),
          .c2 = static_cast<float>(1.0 - s.beta2),
          .eps = static_cast<float>(s.eps),
          .inside_square = static_cast<float>(s.inside_square),
          .residual = s.residual,
          .pairs = s.back != 0,
          .seed = s.seed};
}

}  // namespace

void low_rank_moments(const LowRankTable& table) {
  // A piece of codes has at most 32 vectors where they are long: low_rank_moment_vectors.
  const bool coded = table.states.moments == StatePrecision::int8;
  const int groups = coded ? std::max(kMomentsGroups, 32 * table.rank / kEach) : kMomentsGroups;
  if (coded) {
    static const bool allowed [[maybe_unused]] = [] {
      check_cuda(cudaFuncSetAttribute(moments_of<std::uint8_t>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      32 * kLargestRefreshRank / kEach * static_cast<int>(sizeof(float2))),
                 "cudaFuncSetAttribute");
      return true;
    }();
  }
  launch({"low_rank_moments", static_cast<unsigned>(table.count), kThreads, table.stream,
          static_cast<std::size_t>(groups) * sizeof(float2)},
         of_states(table.states.moments, moments_of<float>, moments_of<bf16>, moments_of<std::uint8_t>), table.matrices,
         table.pieces, table.scalars, table.states.maps, constants(table.step));
}

void low_rank_one_moments(const LowRankTable& table) {
  launch({"low_rank_one_moments", static_cast<unsigned>(table.count), 1024, table.stream},
         of_states(table.states.moments, one_moments_of<float>, one_moments_of<bf16>, one_moments_of<std::uint8_t>),
         table.matrices, table.scalars, table.states.maps, constants(table.step));
}

void low_rank_limit(const LowRankTable& table) {
  const LowRankStep& s = table.step;
  const Limit c{.gamma = s.gamma,
                .outside = s.outside,
                .beta1 = s.beta1,
                .beta2 = s.beta2,
                .weight_decay = s.weight_decay,
                .scale = s.back == 0};
  launch({"low_rank_limit", static_cast<unsigned>(table.count), 1024, table.stream}, limit, table.matrices,
         table.scalars, c);
}

}  // namespace kiln::cuda

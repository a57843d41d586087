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
/// anything, 192 bytes: device memory then has enough to do. Sums of a vector are added by one warp in a fixed order.
template <typename State>
__global__ void __launch_bounds__(kThreads, 3)
    moments_of(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, Moments c) {
  __shared__ float2 sums[kMomentsGroups];  // by group: squares of N and of R
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const int groups_of_vector = t.rank / kEach, vectors = min(piece.column, t.vectors() - piece.row);
  const int groups = vectors * groups_of_vector, thread = static_cast<int>(threadIdx.x);
  const std::int64_t first = static_cast<std::int64_t>(piece.row) * t.rank;
  State* const moment = static_cast<State*>(t.moment) + first;
  State* const square = static_cast<State*>(t.square) + first;
  float* const projected = t.projected + first;
  const std::uint64_t key = rounding_seed(c.seed, scalars[static_cast<int>(Scalar::step)]);
  Eight<State> stored_m[kGroups], stored_v[kGroups];
  Float8 r[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = thread + i * kThreads;
    if (group >= groups) break;
    r[i] = load_state(projected + group * kEach);
    stored_m[i].load(moment + group * kEach);
    stored_v[i].load(square + group * kEach);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = thread + i * kThreads;
    if (group >= groups) break;
    std::uint32_t pairs[kEach];
    Float8 m = stored_m[i].values(), v = stored_v[i].values();
    sums[group] = advance(m, v, r[i], pairs, c);
    store_state(moment + group * kEach, m, key, t.moment_stream, first / kEach + group);
    store_state(square + group * kEach, v, key, t.square_stream, first / kEach + group);
    if (!c.pairs) continue;
    uint4* to = reinterpret_cast<uint4*>(projected + group * kEach);
    to[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
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
    one_moments_of(const LowRankMatrix* matrices, const double* scalars, Moments c) {
  __shared__ double scratch[32];
  if (skipped(scalars)) return;
  const LowRankMatrix& t = matrices[blockIdx.x];
  const int vectors = t.vectors(), thread = static_cast<int>(threadIdx.x);
  const std::uint64_t key = rounding_seed(c.seed, scalars[static_cast<int>(Scalar::step)]);
  double direction2 = 0, projected2 = 0;
  for (int group = thread; group < vectors / kEach; group += 1024) {
    State* const moment = static_cast<State*>(t.moment) + group * kEach;
    State* const square = static_cast<State*>(t.square) + group * kEach;
    Float8 m = load_state(moment), v = load_state(square);
    std::uint32_t pairs[kEach];
    const float2 sum = advance(m, v, load_state(t.projected + group * kEach), pairs, c);
    direction2 += static_cast<double>(sum.x);
    projected2 += static_cast<double>(sum.y);
    store_state(moment, m, key, t.moment_stream, group);
    store_state(square, v, key, t.square_stream, group);
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
  launch({"low_rank_moments", static_cast<unsigned>(table.count), kThreads, table.stream},
         table.half_states ? moments_of<bf16> : moments_of<float>, table.matrices, table.pieces, table.scalars,
         constants(table.step));
}

void low_rank_one_moments(const LowRankTable& table) {
  launch({"low_rank_one_moments", static_cast<unsigned>(table.count), 1024, table.stream},
         table.half_states ? one_moments_of<bf16> : one_moments_of<float>, table.matrices, table.scalars,
         constants(table.step));
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

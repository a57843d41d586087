#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements that a thread has at a time
constexpr float kNormEps = 1e-8f;

struct Moments {
  float b1, b2, c1, c2, eps, inside_square;
  bool residual;
};

/// Vectors [piece.row, piece.row + piece.column) of one matrix. The sums of a vector are those of its groups of eight
/// elements, in order: the result does not depend on how vectors share out threads.
__global__ void __launch_bounds__(kThreads)
    moments_of(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, Moments c) {
  extern __shared__ float2 sums[];  // by group: squares of N and of R
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix t = matrices[piece.matrix];
  const int groups_of_vector = t.rank / kEach, groups = min(piece.column, t.vectors() - piece.row) * groups_of_vector;
  const std::int64_t first = static_cast<std::int64_t>(piece.row) * t.rank;
  for (int group = static_cast<int>(threadIdx.x); group < groups; group += kThreads) {
    const std::int64_t at = first + group * kEach;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4* m = reinterpret_cast<float4*>(t.moment + at) + half;
      float4* v = reinterpret_cast<float4*>(t.square + at) + half;
      float4* projected = reinterpret_cast<float4*>(t.projected + at) + half;
      float4 moment = *m, square = *v;
      const float4 r = *projected;
      uint4 pair;
      auto one = [&](float x, float& first_moment, float& second_moment, std::uint32_t& out) {
        first_moment = c.b1 * first_moment + c.c1 * x;
        second_moment = c.b2 * second_moment + c.c2 * x * x;
        const float n = first_moment / (sqrtf(second_moment) + c.eps);
        sum.x += n * n;
        sum.y += x * x;
        out = pack2(n, x);
      };
      one(r.x, moment.x, square.x, pair.x);
      one(r.y, moment.y, square.y, pair.y);
      one(r.z, moment.z, square.z, pair.z);
      one(r.w, moment.w, square.w, pair.w);
      *m = moment;
      *v = square;
      *reinterpret_cast<uint4*>(projected) = pair;
    }
    sums[group] = sum;
  }
  if (!c.residual) return;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i * groups_of_vector < groups; i += kThreads) {
    float2 total = make_float2(0, 0);
    for (int group = 0; group < groups_of_vector; ++group) {
      total.x += sums[i * groups_of_vector + group].x;
      total.y += sums[i * groups_of_vector + group].y;
    }
    const int vector = piece.row + i;
    const float phi = sqrtf(total.x) / (sqrtf(total.y) + kNormEps);
    t.phi[vector] = phi;
    t.share[vector] = phi * phi * fmaxf(0.0f, t.squares[vector] - c.inside_square * total.y);
  }
}

/// One block a matrix. The limiter: optim/low_rank_adam.h.
__global__ void __launch_bounds__(1024) limit(const LowRankMatrix* matrices, const double* scalars, double gamma) {
  __shared__ double scratch[32];
  if (skipped(scalars)) return;
  const LowRankMatrix t = matrices[blockIdx.x];
  double mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < t.vectors(); i += 1024) mine += static_cast<double>(t.share[i]);
  const double norm = sqrt(block_sum(mine, scratch));
  if (threadIdx.x != 0) return;
  const double previous = static_cast<double>(*t.limiter);
  const double limit = previous > 0 ? fmax(norm / (previous + 1e-8), gamma) / gamma : 1.0;
  *t.limiter = static_cast<float>(norm / limit);
  *t.factor = static_cast<float>(1.0 / limit);
}

}  // namespace

void low_rank_moments(const LowRankTable& table) {
  const LowRankStep& s = table.step;
  const Moments c{.b1 = static_cast<float>(s.beta1),
                  .b2 = static_cast<float>(s.beta2),
                  .c1 = static_cast<float>(1.0 - s.beta1),
                  .c2 = static_cast<float>(1.0 - s.beta2),
                  .eps = static_cast<float>(s.eps),
                  .inside_square = static_cast<float>(s.inside_square),
                  .residual = s.residual};
  launch(
      {"low_rank_moments", static_cast<unsigned>(table.count), kThreads, table.stream, kMomentsGroups * sizeof(float2)},
      moments_of, table.matrices, table.pieces, table.scalars, c);
}

void low_rank_limit(const LowRankTable& table) {
  launch({"low_rank_limit", static_cast<unsigned>(table.count), 1024, table.stream}, limit, table.matrices,
         table.scalars, table.step.gamma);
}

}  // namespace kiln::cuda

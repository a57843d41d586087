#pragma once
#include "kernels/low_rank_grid.cuh"
#include "kernels/low_rank_tile.cuh"
#include "kernels/split_master.cuh"

/// Moments that follow their basis (optim/low_rank_adam.h), by all blocks of a launch. With C = old' new,
///   m <- m C,   v <- c2 |(v^ - m^^2) (C*C) + (m^ C)^2|,   m^ = m / c1, v^ = v / c2.
/// Every product splits its operands in two bf16, since the difference v^ - m^^2 would amplify a rounding.
namespace kiln::cuda {

/// The averages m^ and the variances v^ - m^^2 [vectors, rank] as operands, read along the rank.
template <typename State>
struct MomentFetch {
  StatePointer moment, square;
  StateAccess<State> access;
  int vectors, rank, first;
  float inverse1, inverse2;  // 1 / c1, 1 / c2
  bool variance;

  __device__ float4 operator()(int row, int depth) const {
    if (first + row >= vectors || depth >= rank) return make_float4(0, 0, 0, 0);
    const std::int64_t at = static_cast<std::int64_t>(first + row) * rank + depth;
    float4 m = access.load_four(moment, at, StateValues::any);
    m = make_float4(inverse1 * m.x, inverse1 * m.y, inverse1 * m.z, inverse1 * m.w);
    if (!variance) return m;
    const float4 v = access.load_four(square, at, StateValues::positive);
    return make_float4(inverse2 * v.x - m.x * m.x, inverse2 * v.y - m.y * m.y, inverse2 * v.z - m.z * m.z,
                       inverse2 * v.w - m.w * m.w);
  }
};

/// C or C*C [rank, rank], element by element, as the other operand.
struct TurnFetch {
  MatrixFetch<Contiguous::rows> turn;
  bool squares;

  __device__ float4 operator()(int row, int depth) const {
    const float4 x = turn(row, depth);
    return squares ? make_float4(x.x * x.x, x.y * x.y, x.z * x.z, x.w * x.w) : x;
  }
};

/// Turns the moments of `t` by `turn` [rank, rank]. `averages` and `variances` [vectors, rank] are scratch. `done` is
/// the number of steps that the moments hold. The callers' writes are behind a barrier; ends without one.
template <typename State>
__device__ void rotate_moments(const LowRankMatrix& t, const float* turn, double done, const LowRankStep& step,
                               const CodeMaps* maps, float* averages, float* variances, Grid& grid, bf16* shared) {
  const StateAccess<State> access(maps);
  const float c1 = static_cast<float>(1.0 - pow(step.beta1, done)),
              c2 = static_cast<float>(1.0 - pow(step.beta2, done));
  const int vectors = t.vectors(), rank = t.rank, columns = (rank + kTile - 1) / kTile;
  const int tiles = (vectors + kTile - 1) / kTile * columns;
  const StatePointer moment = t.moment, square = t.square;
  for (int item = grid.block(); item < 2 * tiles; item += grid.blocks()) {
    const bool variance = item >= tiles;
    const int tile = item % tiles, row = tile / columns * kTile, column = tile % columns * kTile;
    float* to = variance ? variances : averages;
    TileProduct<Contiguous::depth, Contiguous::rows, true> product;
    product.run(0, rank, shared,
                MomentFetch<State>{moment, square, access, vectors, rank, row, 1.0f / c1, 1.0f / c2, variance},
                TurnFetch{{turn, rank, rank, column}, variance});
    product.visit([&](int i, int j, float x, float y) {
      if (row + i < vectors && column + j < rank)
        *reinterpret_cast<float2*>(to + static_cast<std::int64_t>(row + i) * rank + column + j) = make_float2(x, y);
    });
  }
  grid.wait();
  const std::uint64_t key = rounding_seed(step.seed, done + 1 + static_cast<double>(step.rotation_step));
  const std::int64_t elements = static_cast<std::int64_t>(vectors) * rank;
  for (std::int64_t e = grid.thread() * 8; !access.done(e, elements); e += grid.threads() * 8) {
    const bool inside = e < elements;
    const std::int64_t at = inside ? e : 0;  // 0: beside others of its warp
    Float8 m = load_state(averages + at), v = load_state(variances + at);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      v.v[j] = c2 * fabsf(v.v[j] + m.v[j] * m.v[j]);
      m.v[j] *= c1;
    }
    access.store(moment, at, m, StateValues::any, key, inside);
    access.store(square, at, v, StateValues::positive, key, inside);
  }
}

}  // namespace kiln::cuda

#include "kernels/low_rank_one.h"

#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/split_master.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements of a group

__global__ void __launch_bounds__(kOneRows) random_vector_of(const LowRankMatrix* matrices, const LowRankPiece* pieces,
                                                             const double* scalars, int every, std::uint64_t seed) {
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const int row = piece.row + static_cast<int>(threadIdx.x);
  if (row < t.side())
    t.q[row] = normal(philox(seed, projection_stream(t, scalars, every), static_cast<std::uint64_t>(row)));
}

/// Vectors are rows: a warp has four of them, so that it reads P once for four. Their number is a multiple of eight.
template <typename T>
__device__ void project_rows(const LowRankMatrix& t, int first, float clip) {
  constexpr int kRows = low_rank_one_vectors(true) / (kThreads / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = first + static_cast<int>(threadIdx.x) / 32 * kRows;
  if (row >= t.m) return;
  const T* g = static_cast<const T*>(t.g) + static_cast<std::int64_t>(row) * t.n;
  float dot[kRows] = {}, square[kRows] = {};
  for (int column = lane * kEach; column < t.n; column += 32 * kEach) {
    Eight<T> stored[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) stored[i].load(g + static_cast<std::int64_t>(i) * t.n + column);
    const Float8 p = load_state(t.q + column);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Float8 x = stored[i].values();
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        dot[i] += p.v[k] * x.v[k];
        square[i] += x.v[k] * x.v[k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    dot[i] = warp_sum(dot[i]);
    square[i] = warp_sum(square[i]);
    if (lane == 0) {
      t.projected[row + i] = clip * dot[i];
      t.squares[row + i] = clip * clip * square[i];
    }
  }
}

/// Vectors are columns: eight threads side by side have eight each, and 32 threads below each other share the rows.
template <typename T>
__device__ void project_columns(const LowRankMatrix& t, int first, float clip) {
  constexpr int kAcross = low_rank_one_vectors(false) / kEach, kDown = kThreads / kAcross, kWarps = kThreads / 32;
  __shared__ float sums[kWarps][kAcross][2 * kEach];
  const int thread = static_cast<int>(threadIdx.x), across = thread % kAcross, column = first + across * kEach;
  float sum[2 * kEach] = {};  // of products with P, then of squares
  if (column < t.n) {
    const T* g = static_cast<const T*>(t.g) + column;
    const int m = t.m;
#pragma unroll 4
    for (int row = thread / kAcross; row < m; row += kDown) {
      Eight<T> stored;
      stored.load(g + static_cast<std::int64_t>(row) * t.n);
      const float p = t.q[row];
      const Float8 x = stored.values();
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        sum[k] += p * x.v[k];
        sum[kEach + k] += x.v[k] * x.v[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 2 * kEach; ++k) {
#pragma unroll
    for (int offset = kAcross; offset < 32; offset *= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
    if (thread % 32 < kAcross) sums[thread / 32][across][k] = sum[k];
  }
  __syncthreads();
  if (thread >= kAcross * 2 * kEach) return;
  const int group = thread / (2 * kEach), k = thread % (2 * kEach), vector = first + group * kEach + k % kEach;
  if (vector >= t.n) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][group][k];
  (k < kEach ? t.projected : t.squares)[vector] = (k < kEach ? clip : clip * clip) * total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    project_of(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars) {
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
  t.right ? project_rows<T>(t, piece.row, clip) : project_columns<T>(t, piece.row, clip);
}

}  // namespace

void low_rank_one_basis(const LowRankTable& table, int every) {
  launch({"low_rank_one_basis", static_cast<unsigned>(table.count), kOneRows, table.stream}, random_vector_of,
         table.matrices, table.pieces, table.scalars, every, table.step.seed);
}

void low_rank_one_project(const LowRankTable& table) {
  launch({"low_rank_one_project", static_cast<unsigned>(table.count), kThreads, table.stream},
         table.half_gradient ? project_of<bf16> : project_of<float>, table.matrices, table.pieces, table.scalars);
}

}  // namespace kiln::cuda

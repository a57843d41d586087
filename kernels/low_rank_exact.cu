#include "kernels/launch.cuh"
#include "kernels/low_rank_exact.h"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kSide = 64, kDepth = 16, kThreads = 256, kAcross = 16;  // threads of a tile stand in a square
constexpr int kEach = kSide / kAcross;                                // rows, and columns, of a thread
static_assert(kAcross * kAcross == kThreads);

__device__ double wide(float x) { return x; }
__device__ double wide(bf16 x) { return __bfloat162float(x); }

/// to [kDepth][kSide]: numbers [first, first + kSide) of the short side of vectors [depth, depth + kDepth).
/// Neighbouring threads read neighbours of a row.
template <typename G>
__device__ void fetch(const G* g, int m, int n, bool right, int first, int depth, double (*to)[kSide + 1]) {
  const int side = right ? n : m, vectors = right ? m : n;
#pragma unroll
  for (int k = 0; k < kSide * kDepth / kThreads; ++k) {
    const int e = static_cast<int>(threadIdx.x) + k * kThreads;
    const int i = right ? e % kSide : e / kDepth, d = right ? e / kSide : e % kDepth;
    const bool inside = first + i < side && depth + d < vectors;
    const std::int64_t at = right ? static_cast<std::int64_t>(depth + d) * n + first + i
                                  : static_cast<std::int64_t>(first + i) * n + depth + d;
    to[d][i] = inside ? wide(g[at]) : 0.0;
  }
}

/// One tile on or above the diagonal a block; those above are written below it as well.
template <typename G>
__global__ void __launch_bounds__(kThreads) gram_of(const G* g, int m, int n, bool right, double* gram) {
  __shared__ double rows[kDepth][kSide + 1], columns[kDepth][kSide + 1];
  if (blockIdx.y > blockIdx.x) return;
  const int side = right ? n : m, vectors = right ? m : n;
  const int row = static_cast<int>(blockIdx.y) * kSide, column = static_cast<int>(blockIdx.x) * kSide;
  const int x = static_cast<int>(threadIdx.x) % kAcross, y = static_cast<int>(threadIdx.x) / kAcross;
  double sum[kEach][kEach] = {};
  for (int depth = 0; depth < vectors; depth += kDepth) {
    fetch(g, m, n, right, row, depth, rows);
    fetch(g, m, n, right, column, depth, columns);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] += rows[d][y + i * kAcross] * columns[d][x + j * kAcross];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const std::int64_t a = row + y + i * kAcross, b = column + x + j * kAcross;
      if (a >= side || b >= side) continue;
      gram[a * side + b] = sum[i][j];
      if (row != column) gram[b * side + a] = sum[i][j];
    }
}

/// By one block, in an order that the size decides.
__global__ void __launch_bounds__(kThreads) trace_of(const double* gram, int side, double* trace) {
  __shared__ double parts[kThreads];
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < side; i += kThreads)
    sum += gram[static_cast<std::int64_t>(i) * side + i];
  parts[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *trace = parts[0];
}

/// Column blockIdx.x of the basis [side, rank]: the eigenvector of that place from the last, its largest component
/// (of equals the first) positive.
__global__ void __launch_bounds__(kThreads) leading_of(const double* vectors, int side, int rank, float* basis) {
  __shared__ double largest[kThreads];
  __shared__ int where[kThreads];
  const int column = static_cast<int>(blockIdx.x), me = static_cast<int>(threadIdx.x);
  const double* vector = vectors + static_cast<std::int64_t>(side - 1 - column) * side;
  largest[me] = -1;
  where[me] = 0;  // also of a vector that has no largest: of NaN alone
  for (int i = me; i < side; i += kThreads)
    if (fabs(vector[i]) > largest[me]) largest[me] = fabs(vector[i]), where[me] = i;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (me >= half) continue;
    const double other = largest[me + half];
    if (other > largest[me] || (other == largest[me] && where[me + half] < where[me]))
      largest[me] = other, where[me] = where[me + half];
  }
  __syncthreads();
  const double sign = vector[where[0]] < 0 ? -1 : 1;
  for (int i = me; i < side; i += kThreads)
    basis[static_cast<std::int64_t>(i) * rank + column] = static_cast<float>(sign * vector[i]);
}

}  // namespace

void low_rank_gram(const LowRankMatrix& t, bool half_gradient, const ExactScratch& scratch, cudaStream_t stream) {
  const unsigned tiles = blocks_for(t.side(), kSide);
  const Launch how{"low_rank_gram", dim3(tiles, tiles), kThreads, stream};
  if (half_gradient)
    launch(how, gram_of<bf16>, static_cast<const bf16*>(t.g), t.m, t.n, t.right, scratch.gram);
  else
    launch(how, gram_of<float>, static_cast<const float*>(t.g), t.m, t.n, t.right, scratch.gram);
  launch({"low_rank_trace", 1, kThreads, stream}, trace_of, scratch.gram, t.side(), scratch.trace);
}

void low_rank_leading(const LowRankMatrix& t, const ExactScratch& scratch, float* basis, cudaStream_t stream) {
  launch({"low_rank_leading", static_cast<unsigned>(t.rank), kThreads, stream}, leading_of, scratch.gram, t.side(),
         t.rank, basis);
}

}  // namespace kiln::cuda

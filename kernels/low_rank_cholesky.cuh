#pragma once
#include "kernels/low_rank_grid.cuh"
#include "kernels/low_rank_tile.cuh"

/// The Gram matrix of tall columns in f64, and its Cholesky factor's inverse, by all blocks of a launch.
namespace kiln::cuda {

inline constexpr int kBlock = 64;       // side of the f64 tiles
inline constexpr int kGramStep = 16;    // rows of x at a time
inline constexpr int kGramItems = 256;  // parts of tiles that the scratch has room for
inline constexpr double kLost = 1e-13;  // a pivot below this part of its column's square is rounding
inline constexpr std::size_t kCholeskyBytes = 2 * kBlock * (kBlock + 1) * sizeof(double);

/// Into how many parts the rows of x are cut: as many as give every block something to do.
__host__ __device__ inline int gram_splits(int rows, int rank) {
  const int side = (rank + kBlock - 1) / kBlock, tiles = side * (side + 1) / 2;
  const int most = (rows + 2 * kGramStep - 1) / (2 * kGramStep);
  const int splits = kGramItems / tiles;
  return splits < 1 ? 1 : splits < most ? splits : most;
}

/// sum += a' b for one row of each operand, of which a thread takes every sixteenth.
__device__ inline void add_outer(double (&sum)[4][4], const double* left, const double* right) {
  double a[4], b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = left[16 * i];
    b[i] = right[16 * i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
}

/// 64 x 64 at [row, column] of the sum over rows [from, to) of x' x.
__device__ inline void gram_tile(const float* x, int from, int to, int rank, int row, int column, double* out,
                                 double* shared) {
  double(*left)[kBlock] = reinterpret_cast<double(*)[kBlock]>(shared);
  double(*right)[kBlock] = left + kGramStep;
  const int thread = static_cast<int>(threadIdx.x), ty = thread / 16, tx = thread % 16;
  double sum[4][4] = {};
  for (int first = from; first < to; first += kGramStep) {
    __syncthreads();
#pragma unroll
    for (int e = thread; e < kGramStep * kBlock; e += kTileThreads) {
      const int k = first + e / kBlock, j = e % kBlock;
      const std::int64_t at = static_cast<std::int64_t>(k) * rank;
      left[e / kBlock][j] = k < to && row + j < rank ? static_cast<double>(x[at + row + j]) : 0.0;
      right[e / kBlock][j] = k < to && column + j < rank ? static_cast<double>(x[at + column + j]) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kGramStep; ++k) add_outer(sum, left[k] + ty, right[k] + tx);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int a = row + ty + 16 * i, b = column + tx + 16 * j;
      if (a < rank && b < rank) out[static_cast<std::int64_t>(a) * rank + b] = sum[i][j];
    }
  __syncthreads();
}

/// Upper tiles of the parts of x' x; x [rows, rank].
__device__ inline void gram_parts(const float* x, int rows, int rank, const RefreshScratch& s, const Grid& grid,
                                  double* shared) {
  const int side = (rank + kBlock - 1) / kBlock, splits = gram_splits(rows, rank);
  const int length = (rows + splits * kGramStep - 1) / (splits * kGramStep) * kGramStep;
  for (int item = grid.block(); item < side * (side + 1) / 2 * splits; item += grid.blocks()) {
    const int split = item % splits;
    int i = 0, j = item / splits;  // the upper tiles, row by row
    while (j >= side - i) j -= side - i++;
    gram_tile(x, split * length, min(rows, (split + 1) * length), rank, i * kBlock, (i + j) * kBlock,
              s.gram_parts + static_cast<std::int64_t>(split) * rank * rank, shared);
  }
}

/// Adds up the parts. The inverse starts as the identity; the columns' angles beyond `limit` raise s.large, and
/// s.triangle is what takes them out to first order: half of the diagonal's excess and all of what is above.
__device__ inline void collect_gram(int rows, int rank, double limit, const RefreshScratch& s, const Grid& grid) {
  const int splits = gram_splits(rows, rank);
  const std::int64_t square = static_cast<std::int64_t>(rank) * rank;
  for (std::int64_t e = grid.thread(); e < square; e += grid.threads()) {
    const int i = static_cast<int>(e / rank), j = static_cast<int>(e % rank);
    s.inverse[e] = i == j ? 1.0 : 0.0;
    if (i > j) {
      s.triangle[static_cast<std::int64_t>(j) * rank + i] = 0;
      continue;
    }
    double sum = 0;
    for (int split = 0; split < splits; ++split) sum += s.gram_parts[split * square + e];
    s.gram[e] = sum;
    const double angle = i == j ? sum - 1.0 : sum;
    if (i == j) s.square[i] = sum;
    if (!(fabs(angle) <= limit)) *s.large = 1;  // NaN too
    s.triangle[static_cast<std::int64_t>(j) * rank + i] = static_cast<float>(i == j ? 0.5 * angle : angle);
  }
}

/// 1 / x to the last bits, without the branches of a division.
__device__ inline double reciprocal(double x) {
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  y = fma(y, fma(-x, y, 1.0), y);
  return fma(y, fma(-x, y, 1.0), y);
}

/// Factors a tile [64, 64], upper, and divides 64 columns beside it by the factor's transpose: rows of both are
/// eliminated together, in registers. Thread (ty, tx) has rows ty + 16 a and columns tx + 16 b of the two tiles side by
/// side; a row is published when it is final, and one barrier a row is all.
struct Panel {
  double x[4][8];

  template <typename F>
  __device__ void load(F&& element) {
    const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 8; ++b) x[a][b] = element(ty + 16 * a, tx + 16 * b);
  }
  /// visit(row, column, value)
  template <typename F>
  __device__ void store(F&& visit) const {
    const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 8; ++b) visit(ty + 16 * a, tx + 16 * b, x[a][b]);
  }
  /// least [64] are the smallest pivots; returns whether one was below. `shared` holds 4 rows of 128 doubles.
  __device__ bool eliminate(int width, const double* least, double* shared) {
    double(*row)[2 * kBlock] = reinterpret_cast<double(*)[2 * kBlock]>(shared);
    double* scale = shared + 4 * kBlock;
    const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;
    bool lost = false;
    auto publish = [&](int a, int k) {
#pragma unroll
      for (int b = 0; b < 8; ++b) row[k % 2][tx + 16 * b] = x[a][b];
    };
    if (ty == 0) publish(0, 0);
    __syncthreads();
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      for (int r = 0; r < 16; ++r) {
        const int k = 16 * a + r;
        if (k < width) {
          double pivot = row[k % 2][k];
          if (!(pivot > least[k])) {  // NaN too
            lost = true;
            pivot = least[k] > 0 ? least[k] : 1.0;
          }
          if (threadIdx.x == 0) scale[k] = pivot;
          const double inverse = reciprocal(pivot);
          double across[8];
#pragma unroll
          for (int b = 0; b < 8; ++b) across[b] = row[k % 2][tx + 16 * b] * inverse;
#pragma unroll
          for (int i = a; i < 4; ++i) {
            const double down = i > a || ty > r ? row[k % 2][ty + 16 * i] : 0.0;
#pragma unroll
            for (int b = 0; b < 8; ++b) x[i][b] -= down * across[b];
          }
        }
        if (r < 15) {
          if (ty == r + 1) publish(a, k + 1);
        } else if (a < 3) {
          if (ty == 0) publish(a + 1 < 4 ? a + 1 : 3, k + 1);
        }
        __syncthreads();
      }
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const double s = ty + 16 * a < width ? rsqrt(scale[ty + 16 * a]) : 0.0;
#pragma unroll
      for (int b = 0; b < 8; ++b) x[a][b] *= s;
    }
    return lost;
  }
};

/// to -= left' right, all 64 x 64 of [r, r] matrices; rows of the first two from `row`, `width` of them.
__device__ inline void subtract_product(const double* left, int left_column, const double* right, int right_column,
                                        double* to, int row, int width, int rank, double* shared) {
  double(*l)[kBlock] = reinterpret_cast<double(*)[kBlock]>(shared);
  double(*r)[kBlock] = l + kBlock;
  const int thread = static_cast<int>(threadIdx.x), ty = thread / 16, tx = thread % 16;
  __syncthreads();
#pragma unroll 8
  for (int e = thread; e < kBlock * kBlock; e += kTileThreads) {
    const int k = e / kBlock, j = e % kBlock;
    const std::int64_t at = static_cast<std::int64_t>(row + k) * rank;
    l[k][j] = k < width && left_column + j < rank ? left[at + left_column + j] : 0.0;
    r[k][j] = k < width && right_column + j < rank ? right[at + right_column + j] : 0.0;
  }
  __syncthreads();
  double sum[4][4] = {};
#pragma unroll 8
  for (int k = 0; k < kBlock; ++k) add_outer(sum, l[k] + ty, r[k] + tx);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int a = left_column + ty + 16 * i, b = right_column + tx + 16 * j;
      if (a < rank && b < rank) to[static_cast<std::int64_t>(a) * rank + b] -= sum[i][j];
    }
}

/// s.gram = R' R; s.triangle = R'^-1, lower. 64 rows at a time: the rows of R and of the inverse, which starts as the
/// identity, are eliminated alike. Every block that has a tile of them factors the diagonal tile for itself, which
/// saves a barrier; then the rows below are brought up to date.
__device__ inline void invert_factor(const RefreshScratch& s, int rank, Grid& grid, double* shared) {
  const int tiles = (rank + kBlock - 1) / kBlock;
  double* least = shared + 5 * kBlock;  // beside the rows and scales of Panel
  for (int p = 0; p < tiles; ++p) {
    const int top = p * kBlock, width = min(kBlock, rank - top);
    // Tiles 0 to p are the inverse's, the others the factor's: right of the diagonal.
    for (int own = grid.block(); own < tiles; own += grid.blocks()) {
      const bool inverse = own <= p;
      double* matrix = inverse ? s.inverse : s.gram;
      const int first = own * kBlock;
      __syncthreads();
      if (threadIdx.x < kBlock)
        least[threadIdx.x] = static_cast<int>(threadIdx.x) < width ? kLost * s.square[top + threadIdx.x] : 0.0;
      Panel panel;
      panel.load([&](int i, int j) {
        if (i >= width) return 0.0;
        const std::int64_t at = static_cast<std::int64_t>(top + i) * rank;
        if (j < kBlock) return i <= j && j < width ? s.gram[at + top + j] : 0.0;
        return first + j - kBlock < rank ? matrix[at + first + j - kBlock] : 0.0;
      });
      __syncthreads();
      if (panel.eliminate(width, least, shared) && threadIdx.x == 0) *s.lost = 1;
      panel.store([&](int i, int j, double value) {
        const int column = first + j - kBlock;
        if (i >= width || j < kBlock || column >= rank) return;
        const std::int64_t at = static_cast<std::int64_t>(top + i) * rank + column;
        matrix[at] = value;
        if (inverse) s.triangle[at] = static_cast<float>(value);
      });
    }
    if (p + 1 == tiles) break;
    grid.wait();
    const int below = tiles - p - 1;
    for (int item = grid.block(); item < below * tiles; item += grid.blocks()) {
      const int i = p + 1 + item / tiles, j = item % tiles;  // of the inverse up to p, of the factor from i on
      if (j > p && j < i) continue;
      subtract_product(s.gram, i * kBlock, j <= p ? s.inverse : s.gram, j * kBlock, j <= p ? s.inverse : s.gram, top,
                       width, rank, shared);
    }
    grid.wait();
  }
}

}  // namespace kiln::cuda

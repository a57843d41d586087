#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/philox.cuh"

namespace kiln::cuda {
namespace {

constexpr int kBlock = 64, kPitch = kBlock + 1;  // of the f64 tiles
constexpr std::size_t kSharedBytes = 96 * 1024;
constexpr int kWarps = kTileThreads / 32;
constexpr double kLost = 1e-13;  // a pivot below this part of its column's square is rounding

/// All blocks of the launch, which run at the same time.
class Grid {
 public:
  __device__ explicit Grid(std::uint32_t* counter) : counter_(counter) {}
  /// What any block wrote before is seen by all after. The counter only ever grows.
  __device__ void wait() {
    __syncthreads();
    target_ += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
      std::uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter_) : "memory");
      } while (seen < target_);
    }
    __syncthreads();
  }

 private:
  std::uint32_t* counter_;
  std::uint32_t target_ = 0;
};

__device__ int block_index() { return static_cast<int>(blockIdx.x); }
__device__ int block_count() { return static_cast<int>(gridDim.x); }

/// The gradient as [short side, vector], the transpose of GradientFetch's.
template <Contiguous kOrder>
struct TransposedFetch {
  const float* g;
  int vectors, side, pitch, first;
  __device__ TransposedFetch(const LowRankMatrix& t, int first_row)
      : g(t.g), vectors(t.vectors()), side(t.side()), pitch(t.n), first(first_row) {}
  __device__ float4 operator()(int, int row, int depth) const {
    if (first + row >= side || depth >= vectors) return make_float4(0, 0, 0, 0);
    const std::int64_t r = first + row, d = depth;
    return *reinterpret_cast<const float4*>(g + (kOrder == Contiguous::rows ? d * pitch + r : r * pitch + d));
  }
};

/// out [rows, rank] = A [rows, depth] b [depth, rank], its tiles shared out between the blocks.
template <typename FetchA, Contiguous kOrder>
__device__ void multiply(const LowRankMatrix& t, int rows, int depth, const float* b, float* out, bf16* shared) {
  const int columns = (t.rank + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * columns;
  for (int tile = block_index(); tile < tiles; tile += block_count()) {
    const int row = tile / columns * kTile, column = tile % columns * kTile;
    FetchA a(t, row);
    BasisFetch<Contiguous::rows> basis(b, depth, t.rank, column);
    TileProduct<kOrder, Contiguous::rows, true> product;
    product.run(depth, shared, a, basis);
    product.visit([&](int i, int j, float x, float y) {
      if (row + i < rows && column + j < t.rank)
        *reinterpret_cast<float2*>(out + static_cast<std::int64_t>(row + i) * t.rank + column + j) = make_float2(x, y);
    });
  }
}

/// 64 x 64 of the Gram matrix at [row, column] = or -= sum over k of x[k][row + i] x[k][column + j], in f64; x has
/// `rank` columns.
template <bool kSubtract, typename T>
__device__ void add_gram_tile(const T* x, int depth, int rank, int row, int column, const RefreshScratch& s,
                              double* shared) {
  constexpr int kStep = 16;
  double(*left)[kBlock] = reinterpret_cast<double(*)[kBlock]>(shared);
  double(*right)[kBlock] = left + kStep;
  const int thread = static_cast<int>(threadIdx.x), ty = thread / 16, tx = thread % 16;
  double sum[4][4] = {};
  for (int first = 0; first < depth; first += kStep) {
    __syncthreads();
    for (int e = thread; e < kStep * kBlock; e += kTileThreads) {
      const int k = first + e / kBlock, j = e % kBlock;
      const std::int64_t at = static_cast<std::int64_t>(k) * rank;
      left[e / kBlock][j] = k < depth && row + j < rank ? static_cast<double>(x[at + row + j]) : 0.0;
      right[e / kBlock][j] = k < depth && column + j < rank ? static_cast<double>(x[at + column + j]) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      double a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = left[k][ty + 16 * i];
        b[i] = right[k][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int a = row + ty + 16 * i, b = column + tx + 16 * j;
      if (a >= rank || b >= rank) continue;
      double& to = s.gram[static_cast<std::int64_t>(a) * rank + b];
      to = kSubtract ? to - sum[i][j] : sum[i][j];
      if (!kSubtract && a == b) s.square[a] = sum[i][j];
    }
  __syncthreads();
}

/// Upper tiles of gram, from row `first` on.
template <bool kSubtract, typename T>
__device__ void add_gram(const T* x, int depth, int rank, int first, const RefreshScratch& s, double* shared) {
  const int blocks = (rank - first + kBlock - 1) / kBlock;
  for (int tile = block_index(); tile < blocks * blocks; tile += block_count()) {
    const int i = tile / blocks, j = tile % blocks;
    if (i <= j) add_gram_tile<kSubtract>(x, depth, rank, first + i * kBlock, first + j * kBlock, s, shared);
  }
}

/// Gram = R' R in place, R upper. Rows of 64 at a time: every block factors the diagonal tile for itself and solves
/// the tiles of columns that are its own; then the rest is brought up to date.
__device__ void factor(const RefreshScratch& s, int rank, Grid& grid, double* shared) {
  double(*diagonal)[kPitch] = reinterpret_cast<double(*)[kPitch]>(shared);
  double(*columns)[kPitch] = diagonal + kBlock;
  const int thread = static_cast<int>(threadIdx.x);
  auto at = [&](int i, int j) -> double& { return s.gram[static_cast<std::int64_t>(i) * rank + j]; };
  for (int p = 0; p < rank; p += kBlock) {
    const int width = min(kBlock, rank - p), rest = (rank - p - 1) / kBlock;
    // Block 0 always holds the diagonal tile, which it writes once nobody reads the old one.
    for (int own = block_index(); own < max(rest, 1); own += block_count()) {
      const int first = p + kBlock * (own + 1);
      for (int e = thread; e < kBlock * kBlock; e += kTileThreads) {
        const int i = e / kBlock, j = e % kBlock;
        diagonal[i][j] = i < width && j < width && i <= j ? at(p + i, p + j) : 0.0;
        columns[i][j] = i < width && first + j < rank ? at(p + i, first + j) : 0.0;
      }
      __syncthreads();
      for (int k = 0; k < width; ++k) {
        double pivot = diagonal[k][k];
        const double least = kLost * s.square[p + k];
        if (!(pivot > least)) {  // NaN too
          if (thread == 0 && own == 0) *s.lost = 1;
          pivot = least > 0 ? least : 1.0;
        }
        const double inverse = rsqrt(pivot);
        __syncthreads();
        if (thread < kBlock) {
          if (thread >= k) diagonal[k][thread] = thread == k ? sqrt(pivot) : diagonal[k][thread] * inverse;
        } else if (thread < 2 * kBlock) {
          columns[k][thread - kBlock] *= inverse;
        }
        __syncthreads();
        for (int e = thread; e < (width - k - 1) * 2 * kBlock; e += kTileThreads) {
          const int i = k + 1 + e / (2 * kBlock), j = e % (2 * kBlock);
          if (j >= kBlock)
            columns[i][j - kBlock] -= diagonal[k][i] * columns[k][j - kBlock];
          else if (j >= i)
            diagonal[i][j] -= diagonal[k][i] * diagonal[k][j];
        }
        __syncthreads();
      }
      for (int e = thread; e < kBlock * kBlock; e += kTileThreads) {
        const int i = e / kBlock, j = e % kBlock;
        if (i < width && first + j < rank) at(p + i, first + j) = columns[i][j];
      }
      __syncthreads();
    }
    grid.wait();
    if (block_index() == 0) {
      for (int e = thread; e < kBlock * kBlock; e += kTileThreads) {
        const int i = e / kBlock, j = e % kBlock;
        if (i <= j && j < width) at(p + i, p + j) = diagonal[i][j];
      }
      __syncthreads();
    }
    add_gram<true>(s.gram + static_cast<std::int64_t>(p) * rank, width, rank, p + kBlock, s, shared);
    grid.wait();
  }
}

/// x [rows, rank] <- x R^-1; a warp takes kRows rows at a time.
template <int kRows>
__device__ void solve(float* x, int rows, int rank, const double* r, float* shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* mine = shared + static_cast<std::int64_t>(warp) * kRows * rank;
  for (int first = (block_index() * kWarps + warp) * kRows; first < rows; first += block_count() * kWarps * kRows) {
    const int count = min(kRows, rows - first) * rank;
    float* from = x + static_cast<std::int64_t>(first) * rank;
    for (int e = lane; e < kRows * rank; e += 32) mine[e] = e < count ? from[e] : 0.0f;
    __syncwarp();
    for (int k = 0; k < rank; ++k) {
      const double* row = r + static_cast<std::int64_t>(k) * rank;
      const float inverse = static_cast<float>(1.0 / row[k]);
      float value[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) value[i] = mine[i * rank + k] * inverse;
      __syncwarp();
      for (int j = k + lane; j < rank; j += 32) {
        const float factor = static_cast<float>(row[j]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) mine[i * rank + j] = j == k ? value[i] : mine[i * rank + j] - value[i] * factor;
      }
      __syncwarp();
    }
    for (int e = lane; e < count; e += 32) from[e] = mine[e];
    __syncwarp();
  }
}

/// Orthonormal columns for s.outer [rows, rank], each along the column it came from: CholeskyQR, twice (Yamamoto et al.
/// 2015), with the Gram matrix in f64, so that the squares of condition numbers up to 1e6 fit. A column that the others
/// hold up to rounding keeps its rounding, which a third round makes orthogonal (Fukaya et al. 2020). False when that
/// fails too: the columns are then not orthonormal.
__device__ bool orthonormalise(const RefreshScratch& s, int rows, int rank, Grid& grid, unsigned char* shared) {
  bool whole = true;
  for (int round = 0, rounds = 2; round < rounds; ++round) {
    if (block_index() == 0 && threadIdx.x == 0) *s.lost = 0;
    add_gram<false>(s.outer, rows, rank, 0, s, reinterpret_cast<double*>(shared));
    grid.wait();
    factor(s, rank, grid, reinterpret_cast<double*>(shared));
    whole = *reinterpret_cast<volatile std::uint32_t*>(s.lost) == 0;
    if (!whole) rounds = 3;
    if (rank <= kLargestRefreshRank / 2)
      solve<4>(s.outer, rows, rank, s.gram, reinterpret_cast<float*>(shared));
    else
      solve<2>(s.outer, rows, rank, s.gram, reinterpret_cast<float*>(shared));
    grid.wait();
  }
  return whole;
}

__device__ void refresh_one(const LowRankMatrix& t, const RefreshScratch& s, int passes, bool cold, std::uint64_t seed,
                            Grid& grid, unsigned char* shared) {
  const int side = t.side(), elements = side * t.rank;
  const int thread = block_index() * kTileThreads + static_cast<int>(threadIdx.x),
            threads = block_count() * kTileThreads;
  bf16* operands = reinterpret_cast<bf16*>(shared);
  auto take = [&] {
    for (int e = thread; e < elements; e += threads) t.q[e] = s.outer[e];
    grid.wait();
  };
  if (cold) {
    for (int e = thread; e < elements; e += threads)
      s.outer[e] = normal(philox(seed, t.stream, static_cast<std::uint64_t>(e)));
    grid.wait();
    orthonormalise(s, side, t.rank, grid, shared);
    take();
  }
  for (int pass = 0; pass < passes; ++pass) {
    if (t.right) {
      multiply<GradientFetch<Contiguous::depth>, Contiguous::depth>(t, t.m, side, t.q, s.inner, operands);
      grid.wait();
      multiply<TransposedFetch<Contiguous::rows>, Contiguous::rows>(t, side, t.m, s.inner, s.outer, operands);
    } else {
      multiply<GradientFetch<Contiguous::rows>, Contiguous::rows>(t, t.n, side, t.q, s.inner, operands);
      grid.wait();
      multiply<TransposedFetch<Contiguous::depth>, Contiguous::depth>(t, side, t.n, s.inner, s.outer, operands);
    }
    grid.wait();
    if (!orthonormalise(s, side, t.rank, grid, shared)) return;
    take();
  }
}

__global__ void __launch_bounds__(kTileThreads, 1)
    refresh(const LowRankMatrix* matrices, int count, const double* scalars, RefreshScratch scratch,
            RefreshPasses options, std::uint64_t seed) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (skipped(scalars)) return;
  const auto done = static_cast<std::int64_t>(scalars[static_cast<int>(Scalar::step)]) - 1;
  Grid grid(scratch.barrier);
  for (int i = 0; i < count; ++i) {
    if (done != 0 && done % options.every != matrices[i].refresh_offset) continue;
    refresh_one(matrices[i], scratch, done == 0 ? options.cold_passes : options.passes, done == 0, seed, grid, memory);
  }
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
std::size_t product(int a, int b, std::size_t size) {
  return aligned(static_cast<std::size_t>(a) * static_cast<std::size_t>(b) * size);
}

}  // namespace

std::size_t refresh_scratch_bytes(int vectors, int side, int rank) {
  return product(vectors, rank, sizeof(float)) + product(side, rank, sizeof(float)) +
         product(rank, rank + 1, sizeof(double)) + 256;
}

RefreshScratch cut_refresh_scratch(void* memory, int vectors, int side, int rank) {
  auto* p = static_cast<std::byte*>(memory);
  auto cut = [&](std::size_t bytes) {
    std::byte* here = p;
    p += bytes;
    return here;
  };
  RefreshScratch s{};
  s.barrier = reinterpret_cast<std::uint32_t*>(cut(256));
  s.lost = s.barrier + 32;  // a cache line of its own
  s.inner = reinterpret_cast<float*>(cut(product(vectors, rank, sizeof(float))));
  s.outer = reinterpret_cast<float*>(cut(product(side, rank, sizeof(float))));
  s.gram = reinterpret_cast<double*>(cut(product(rank, rank + 1, sizeof(double))));
  s.square = s.gram + static_cast<std::int64_t>(rank) * rank;
  return s;
}

void low_rank_refresh(const LowRankTable& table, const RefreshScratch& scratch, const RefreshPasses& options) {
  static_assert(kSharedBytes >= 2 * kLargestRefreshRank * kWarps * sizeof(float));
  static_assert(kSharedBytes >= TileProduct<Contiguous::depth, Contiguous::rows, true>::kSharedBytes);
  static_assert(kSharedBytes >= 2 * kBlock * kPitch * sizeof(double));
  static const bool allowed [[maybe_unused]] = [] {
    check_cuda(cudaFuncSetAttribute(refresh, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "cudaFuncSetAttribute");
    return true;
  }();
  check_cuda(cudaMemsetAsync(scratch.barrier, 0, 256, table.stream), "cudaMemsetAsync");
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(table.multiprocessors);
  config.blockDim = kTileThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = table.stream;
  config.attrs = &together;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, refresh, table.matrices, table.count, table.scalars, scratch, options,
                                table.step.seed),
             "low_rank_refresh");
}

}  // namespace kiln::cuda

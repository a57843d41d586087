#include "ops/gemm.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "core/parallel.h"
#include "core/tensor.h"
#include "ops/simd.h"

// Blocked as in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with the two inner loops
// exchanged: a [kc, nc] block of packed B stays in L2, MR rows of A in L1, and a micro-kernel keeps an [MR, NR] tile of
// C in registers while it walks along C's rows. A is read where it lies when its rows run along k, so only the
// transposed case pays for packing it.
namespace kiln {
namespace {

using simd::kLanes;

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 of B: 26 of 32 registers
#elif defined(__AVX__)
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kTileRows = 4;
#endif

template <typename T>
struct Tile {
  static constexpr int kRows = kTileRows;
  static constexpr int kColumns = 2 * kLanes<T>;
  static constexpr std::int64_t kDepth = 1536 / static_cast<std::int64_t>(sizeof(T));  // kc
  static constexpr std::int64_t kBlockRows = 40 * kRows;                               // mc, for packed A
  static constexpr std::int64_t kBlockColumns = 24 * kColumns;  // nc: 1.2 MB of B in L2 with AVX-512
};

/// Strides of A as the micro-kernel reads it: element (i, k) at a[i * row + k * depth].
struct Strides {
  std::int64_t row, depth;
};

/// C[Rows, NR] (+)= alpha * A * B over `depth` terms; B is a packed panel [depth, NR].
template <typename T, int Rows>
void micro_kernel(std::int64_t depth, const T* a, Strides stride, const T* b, T alpha, T beta, T* c, std::int64_t ldc) {
  using V = simd::Vector<T>;
  V sum[Rows][2] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    const V b0 = simd::load(b), b1 = simd::load(b + kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T x = a[i * stride.row];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
    a += stride.depth;
    b += Tile<T>::kColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    T* out = c + i * ldc;
    if (beta == T(0)) {
      simd::store<T>(out, alpha * sum[i][0]);
      simd::store<T>(out + kLanes<T>, alpha * sum[i][1]);
    } else {
      simd::store<T>(out, alpha * sum[i][0] + beta * simd::load(out));
      simd::store<T>(out + kLanes<T>, alpha * sum[i][1] + beta * simd::load(out + kLanes<T>));
    }
  }
}

template <typename T>
using Kernel = void (*)(std::int64_t, const T*, Strides, const T*, T, T, T*, std::int64_t);

template <typename T, std::size_t... I>
constexpr std::array<Kernel<T>, sizeof...(I)> kernel_table(std::index_sequence<I...>) {
  return {&micro_kernel<T, static_cast<int>(I) + 1>...};
}
/// Micro-kernels for 1 .. kRows rows, so that the last rows of a matrix cost what they need.
template <typename T>
constexpr auto kKernels = kernel_table<T>(std::make_index_sequence<Tile<T>::kRows>());

/// Packs B[k0 .. k0+depth, n0 .. n0+columns] into panels [depth, NR], zero-filled past the last column.
template <typename T>
void pack_b(const GemmArgs<T>& g, std::int64_t k0, std::int64_t depth, std::int64_t n0, std::int64_t columns, T* out) {
  constexpr std::int64_t kNr = Tile<T>::kColumns;
  for (std::int64_t j = 0; j < columns; j += kNr, out += depth * kNr) {
    const std::int64_t width = std::min(kNr, columns - j);
    if (g.trans_b == Trans::no) {
      const T* b = g.b + k0 * g.ldb + n0 + j;
      for (std::int64_t k = 0; k < depth; ++k, b += g.ldb) {
        for (std::int64_t c = 0; c < width; ++c) out[k * kNr + c] = b[c];
        for (std::int64_t c = width; c < kNr; ++c) out[k * kNr + c] = T(0);
      }
      continue;
    }
    // Transposed: whole blocks of kLanes x kLanes through registers, then the edges.
    const T* b = g.b + (n0 + j) * g.ldb + k0;
    std::int64_t c = 0;
    for (; c + kLanes<T> <= width; c += kLanes<T>) {
      std::int64_t k = 0;
      for (; k + kLanes<T> <= depth; k += kLanes<T>) {
        simd::Vector<T> block[kLanes<T>];
#pragma GCC unroll 16
        for (int p = 0; p < kLanes<T>; ++p) block[p] = simd::load(b + (c + p) * g.ldb + k);
        simd::transpose<T>(block);
#pragma GCC unroll 16
        for (int p = 0; p < kLanes<T>; ++p) simd::store(out + (k + p) * kNr + c, block[p]);
      }
      for (; k < depth; ++k)
        for (std::int64_t p = 0; p < kLanes<T>; ++p) out[k * kNr + c + p] = b[(c + p) * g.ldb + k];
    }
    for (; c < width; ++c)
      for (std::int64_t k = 0; k < depth; ++k) out[k * kNr + c] = b[c * g.ldb + k];
    for (; c < kNr; ++c)
      for (std::int64_t k = 0; k < depth; ++k) out[k * kNr + c] = T(0);
  }
}

/// Packs A' (stored [k, m]) into panels [depth, MR].
template <typename T>
void pack_a(const GemmArgs<T>& g, std::int64_t k0, std::int64_t depth, std::int64_t m0, std::int64_t rows, T* out) {
  constexpr std::int64_t kMr = Tile<T>::kRows;
  for (std::int64_t i = 0; i < rows; i += kMr, out += depth * kMr) {
    const std::int64_t height = std::min(kMr, rows - i);
    const T* a = g.a + k0 * g.lda + m0 + i;
    if (height == kMr) {
      for (std::int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kMr; ++r) out[k * kMr + r] = a[k * g.lda + r];
    } else {
      for (std::int64_t k = 0; k < depth; ++k)
        for (std::int64_t r = 0; r < height; ++r) out[k * kMr + r] = a[k * g.lda + r];
    }
  }
}

/// Packed panels of one thread, allocated at its first call.
template <typename T>
struct Scratch {
  Buffer a{static_cast<std::size_t>(Tile<T>::kBlockRows * Tile<T>::kDepth) * sizeof(T), "GEMM panels"};
  Buffer b{static_cast<std::size_t>(Tile<T>::kBlockColumns * Tile<T>::kDepth) * sizeof(T), "GEMM panels"};
};

/// One row of tiles: A's `rows` <= MR rows against every panel of the packed block. C is written along its rows, so
/// that its lines stream; full-width tiles go straight to C, the last columns through a small tile.
template <typename T>
void multiply_row(const GemmArgs<T>& g, std::int64_t depth, const T* a, Strides stride, const T* packed_b, T beta, T* c,
                  std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kNr = Tile<T>::kColumns;
  const Kernel<T> kernel = kKernels<T>[static_cast<std::size_t>(rows - 1)];
  std::int64_t j = 0;
  for (; j + kNr <= columns; j += kNr) kernel(depth, a, stride, packed_b + j * depth, g.alpha, beta, c + j, g.ldc);
  if (j == columns) return;
  alignas(64) T tile[Tile<T>::kRows * kNr];
  kernel(depth, a, stride, packed_b + j * depth, g.alpha, T(0), tile, kNr);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t k = j; k < columns; ++k)
      c[i * g.ldc + k] = tile[i * kNr + k - j] + (beta == T(0) ? T(0) : beta * c[i * g.ldc + k]);
}

/// C *= beta, for an empty sum.
template <typename T>
void scale_only(const GemmArgs<T>& g) {
  for (std::int64_t i = 0; i < g.m; ++i)
    for (std::int64_t j = 0; j < g.n; ++j) g.c[i * g.ldc + j] = g.beta == T(0) ? T(0) : g.beta * g.c[i * g.ldc + j];
}

/// Rows and columns of C that one thread computes.
struct Grid {
  std::int64_t rows = 1, columns = 1;
};

/// Splits C between threads so that the largest share of tiles is least; ties prefer columns, where no packing repeats.
template <typename T>
Grid choose_grid(std::int64_t m, std::int64_t n, std::int64_t threads) {
  const std::int64_t tile_rows = (m + Tile<T>::kRows - 1) / Tile<T>::kRows;
  const std::int64_t tile_columns = (n + Tile<T>::kColumns - 1) / Tile<T>::kColumns;
  Grid best;
  std::int64_t least = -1;
  for (std::int64_t rows = 1; rows <= threads; ++rows) {
    const std::int64_t columns = threads / rows;
    const std::int64_t share = ((tile_rows + rows - 1) / rows) * ((tile_columns + columns - 1) / columns);
    if (least < 0 || share < least) {
      best = {rows, columns};
      least = share;
    }
  }
  return best;
}

}  // namespace

template <typename T>
void gemm_single(const GemmArgs<T>& g) {
  using Sizes = Tile<T>;
  if (g.m <= 0 || g.n <= 0) return;
  if (g.k <= 0) return scale_only(g);
  thread_local Scratch<T> scratch;
  T* const packed_a = reinterpret_cast<T*>(scratch.a.data());
  T* const packed_b = reinterpret_cast<T*>(scratch.b.data());
  const std::int64_t blocks = (g.k + Sizes::kDepth - 1) / Sizes::kDepth;
  const std::int64_t depth_step = (g.k + blocks - 1) / blocks;
  for (std::int64_t n0 = 0; n0 < g.n; n0 += Sizes::kBlockColumns) {
    const std::int64_t columns = std::min(Sizes::kBlockColumns, g.n - n0);
    for (std::int64_t k0 = 0; k0 < g.k; k0 += depth_step) {
      const std::int64_t depth = std::min(depth_step, g.k - k0);
      const T beta = k0 == 0 ? g.beta : T(1);
      pack_b(g, k0, depth, n0, columns, packed_b);
      for (std::int64_t m0 = 0; m0 < g.m; m0 += Sizes::kBlockRows) {
        const std::int64_t rows = std::min(Sizes::kBlockRows, g.m - m0);
        const bool in_place = g.trans_a == Trans::no;
        if (!in_place) pack_a(g, k0, depth, m0, rows, packed_a);
        const T* a = in_place ? g.a + m0 * g.lda + k0 : packed_a;
        const Strides stride = in_place ? Strides{g.lda, 1} : Strides{1, Sizes::kRows};
        const std::int64_t panel_step = in_place ? Sizes::kRows * g.lda : Sizes::kRows * depth;
        for (std::int64_t i = 0; i < rows; i += Sizes::kRows)
          multiply_row(g, depth, a + i / Sizes::kRows * panel_step, stride, packed_b, beta, g.c + (m0 + i) * g.ldc + n0,
                       std::min<std::int64_t>(Sizes::kRows, rows - i), columns);
      }
    }
  }
}

template <typename T>
void gemm(const GemmArgs<T>& g) {
  // A thread pays for itself from about 10^5 multiply-adds.
  const std::int64_t useful = std::max<std::int64_t>(1, g.m * g.n * std::max<std::int64_t>(g.k, 1) / 100'000);
  const std::int64_t threads = std::min<std::int64_t>(thread_count(), useful);
  const Grid grid = choose_grid<T>(g.m, g.n, threads);
  auto edge = [](std::int64_t size, std::int64_t part, std::int64_t parts, std::int64_t unit) {
    const std::int64_t tiles = (size + unit - 1) / unit;
    return std::min(size, tiles * part / parts * unit);
  };
  parallel_for(grid.rows * grid.columns, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t r = part / grid.columns, c = part % grid.columns;
      const std::int64_t m0 = edge(g.m, r, grid.rows, Tile<T>::kRows);
      const std::int64_t n0 = edge(g.n, c, grid.columns, Tile<T>::kColumns);
      GemmArgs<T> share = g;
      share.m = edge(g.m, r + 1, grid.rows, Tile<T>::kRows) - m0;
      share.n = edge(g.n, c + 1, grid.columns, Tile<T>::kColumns) - n0;
      share.a += g.trans_a == Trans::no ? m0 * g.lda : m0;
      share.b += g.trans_b == Trans::no ? n0 : n0 * g.ldb;
      share.c += m0 * g.ldc + n0;
      gemm_single(share);
    }
  });
}

template void gemm<float>(const GemmArgs<float>&);
template void gemm<double>(const GemmArgs<double>&);
template void gemm_single<float>(const GemmArgs<float>&);
template void gemm_single<double>(const GemmArgs<double>&);

}  // namespace kiln

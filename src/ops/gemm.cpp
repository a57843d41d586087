#include "ops/gemm.h"

#include <algorithm>

#include "core/parallel.h"
#include "core/tensor.h"
#include "ops/gemm_tiles.h"

// Blocked as in Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with the two inner loops
// exchanged: a [kc, nc] block of packed B stays in L2, MR rows of A in L1, and a micro-kernel keeps an [MR, NR] tile of
// C in registers while it walks along C's rows. A is read where it lies when its rows run along k, so only the
// transposed case pays for packing it.
namespace kiln {
namespace {

using tiles::Strides;
using tiles::Tile;

template <typename T>
constexpr std::int64_t kBlockRows = 40 * Tile<T>::kRows;  // mc, for packed A
template <typename T>
constexpr std::int64_t kBlockColumns = 24 * Tile<T>::kColumns;  // nc: 1.2 MB of B in L2 with AVX-512

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
  Buffer a{static_cast<std::size_t>(kBlockRows<T> * Tile<T>::kDepth) * sizeof(T), "GEMM panels"};
  Buffer b{static_cast<std::size_t>(kBlockColumns<T> * Tile<T>::kDepth) * sizeof(T), "GEMM panels"};
};

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
  if (g.m <= 0 || g.n <= 0) return;
  if (g.k <= 0) return scale_only(g);
  thread_local Scratch<T> scratch;
  T* const packed_a = reinterpret_cast<T*>(scratch.a.data());
  T* const packed_b = reinterpret_cast<T*>(scratch.b.data());
  constexpr std::int64_t kMr = Tile<T>::kRows;
  const std::int64_t blocks = (g.k + Tile<T>::kDepth - 1) / Tile<T>::kDepth;
  const std::int64_t depth_step = (g.k + blocks - 1) / blocks;
  const bool in_place = g.trans_a == Trans::no;
  for (std::int64_t n0 = 0; n0 < g.n; n0 += kBlockColumns<T>) {
    const std::int64_t columns = std::min(kBlockColumns<T>, g.n - n0);
    for (std::int64_t k0 = 0; k0 < g.k; k0 += depth_step) {
      const std::int64_t depth = std::min(depth_step, g.k - k0);
      tiles::pack<T>({g.trans_b, g.b + (g.trans_b == Trans::no ? k0 * g.ldb + n0 : n0 * g.ldb + k0), g.ldb}, depth,
                     columns, packed_b);
      for (std::int64_t m0 = 0; m0 < g.m; m0 += kBlockRows<T>) {
        const std::int64_t rows = std::min(kBlockRows<T>, g.m - m0);
        if (!in_place) pack_a(g, k0, depth, m0, rows, packed_a);
        const T* a = in_place ? g.a + m0 * g.lda + k0 : packed_a;
        for (std::int64_t i = 0; i < rows; i += kMr)
          tiles::TileRow<T>{.rows = std::min(kMr, rows - i),
                            .columns = columns,
                            .depth = depth,
                            .a = a + i * (in_place ? g.lda : depth),
                            .stride = in_place ? Strides{g.lda, 1} : Strides{1, kMr},
                            .panels = packed_b,
                            .alpha = g.alpha,
                            .beta = k0 == 0 ? g.beta : T(1),
                            .c = g.c + (m0 + i) * g.ldc + n0,
                            .ldc = g.ldc}
              .multiply();
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

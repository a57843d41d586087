#include "ops/gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>

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
constexpr std::int64_t kBlockColumns = 16 * Tile<T>::kColumns;  // nc: 786 KB of B in L2 with AVX-512
template <typename T>
constexpr std::int64_t kPackedRows = 4 * Tile<T>::kRows;  // of A', so that whole lines are read

/// Packs `rows` columns of A' (stored [k, m]) into panels [depth, MR].
template <typename T>
void pack_a(const T* a, std::int64_t lda, std::int64_t depth, std::int64_t rows, T* out) {
  constexpr std::int64_t kMr = Tile<T>::kRows;
  for (std::int64_t k = 0; k < depth; ++k, a += lda, out += kMr)
    for (std::int64_t i = 0; i < rows; i += kMr) {
      // A size known to the compiler becomes vector moves.
      if (i + kMr <= rows)
        std::memcpy(out + i * depth, a + i, kMr * sizeof(T));
      else
        std::memcpy(out + i * depth, a + i, static_cast<std::size_t>(rows - i) * sizeof(T));
    }
}

/// Packed panels of one thread, allocated at its first call.
template <typename T>
struct Scratch {
  Buffer a{static_cast<std::size_t>(kPackedRows<T> * Tile<T>::kDepth) * sizeof(T), "GEMM panels"};
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

/// Splits C between threads so that the largest share of tiles is least; ties go to the least reading, since every row
/// of the grid packs B again and every column reads A again.
template <typename T>
Grid choose_grid(const GemmArgs<T>& g, std::int64_t threads) {
  const std::int64_t tile_rows = (g.m + Tile<T>::kRows - 1) / Tile<T>::kRows;
  const std::int64_t tile_columns = (g.n + Tile<T>::kColumns - 1) / Tile<T>::kColumns;
  Grid best;
  std::pair<std::int64_t, std::int64_t> least{-1, 0};
  for (std::int64_t rows = 1; rows <= threads; ++rows) {
    const std::int64_t columns = threads / rows;
    const std::int64_t share = ((tile_rows + rows - 1) / rows) * ((tile_columns + columns - 1) / columns);
    const std::pair cost{share, rows * g.n + columns * g.m};
    if (least.first >= 0 && cost >= least) continue;
    best = {rows, columns};
    least = cost;
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
      for (std::int64_t m0 = 0; m0 < g.m; m0 += kMr) {
        const std::int64_t packed = m0 % kPackedRows<T>;
        if (!in_place && packed == 0)
          pack_a(g.a + k0 * g.lda + m0, g.lda, depth, std::min(kPackedRows<T>, g.m - m0), packed_a);
        tiles::TileRow<T>{.rows = std::min(kMr, g.m - m0),
                          .columns = columns,
                          .depth = depth,
                          .a = in_place ? g.a + m0 * g.lda + k0 : packed_a + packed * depth,
                          .stride = in_place ? Strides{g.lda, 1} : Strides{1, kMr},
                          .panels = packed_b,
                          .alpha = g.alpha,
                          .beta = k0 == 0 ? g.beta : T(1),
                          .c = g.c + m0 * g.ldc + n0,
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
  const Grid grid = choose_grid(g, threads);
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

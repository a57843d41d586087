#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "ops/gemm.h"
#include "ops/simd.h"

// Register tiles and packed panels of the GEMM, for it and for kernels that go on with a product while it is in the
// caches. Private to the CPU kernels: included by sources, never by a public header.
namespace kiln::tiles {

using simd::kLanes;

#if defined(__AVX512F__)
inline constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 of B: 26 of 32 registers
#elif defined(__AVX__)
inline constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#else
inline constexpr int kTileRows = 4;
#endif

template <typename T>
struct Tile {
  static constexpr std::int64_t kRows = kTileRows;
  static constexpr std::int64_t kColumns = 2 * kLanes<T>;
  static constexpr std::int64_t kDepth = 1536 / static_cast<std::int64_t>(sizeof(T));  // kc
};

/// Columns that panels of B hold, with the zeros past the last one.
template <typename T>
constexpr std::int64_t padded_columns(std::int64_t columns) {
  return (columns + Tile<T>::kColumns - 1) / Tile<T>::kColumns * Tile<T>::kColumns;
}

/// Strides of A as the micro-kernel reads it: element (i, k) at a[i * row + k * depth].
struct Strides {
  std::int64_t row, depth;
};

/// C[Rows, NR] (+)= alpha * A * B over `depth` terms; B is a packed panel [depth, NR].
template <typename T, int Rows>
void micro_kernel(std::int64_t depth, const T* a, Strides stride, const T* b, T alpha, T beta, T* c, std::int64_t ldc) {
  using V = simd::Vector<T>;
  // One pointer for three rows: base, base + row and base + 2 row are addressing modes of x86, so that the loop has no
  // address to compute or to spill.
  constexpr int kPointers = (Rows + 2) / 3;
  const T* rows[kPointers];
  for (int p = 0; p < kPointers; ++p) rows[p] = a + 3 * p * stride.row;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {  // C arrives while the sums are made
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + kLanes<T>, 1);
  }
  V sum[Rows][2] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    const V b0 = simd::load(b), b1 = simd::load(b + kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T x = rows[i / 3][i % 3 * stride.row];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPointers; ++p) {
      rows[p] += stride.depth;
      asm("" : "+r"(rows[p]));  // or GCC folds them into offsets from one pointer, and spills those
    }
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

/// A [depth, columns] block of op(B) as it lies in memory; with Trans::yes it is stored [columns, depth].
template <typename T>
struct Block {
  Trans trans;
  const T* b;
  std::int64_t ldb;
};

/// Packs the block into panels [depth, NR], zero-filled past the last column.
template <typename T>
void pack(const Block<T>& block, std::int64_t depth, std::int64_t columns, T* out) {
  constexpr std::int64_t kNr = Tile<T>::kColumns;
  for (std::int64_t j = 0; j < columns; j += kNr, out += depth * kNr) {
    const std::int64_t width = std::min(kNr, columns - j);
    if (block.trans == Trans::no) {
      const T* b = block.b + j;
      for (std::int64_t k = 0; k < depth; ++k, b += block.ldb) {
        if (width == kNr) {  // a size known to the compiler becomes vector moves
          std::memcpy(out + k * kNr, b, kNr * sizeof(T));
          continue;
        }
        for (std::int64_t c = 0; c < width; ++c) out[k * kNr + c] = b[c];
        for (std::int64_t c = width; c < kNr; ++c) out[k * kNr + c] = T(0);
      }
      continue;
    }
    // Transposed: whole squares of kLanes x kLanes through registers, then the edges.
    const T* b = block.b + j * block.ldb;
    std::int64_t c = 0;
    for (; c + kLanes<T> <= width; c += kLanes<T>) {
      std::int64_t k = 0;
      for (; k + kLanes<T> <= depth; k += kLanes<T>) {
        simd::Vector<T> square[kLanes<T>];
#pragma GCC unroll 16
        for (int p = 0; p < kLanes<T>; ++p) square[p] = simd::load(b + (c + p) * block.ldb + k);
        simd::transpose<T>(square);
#pragma GCC unroll 16
        for (int p = 0; p < kLanes<T>; ++p) simd::store(out + (k + p) * kNr + c, square[p]);
      }
      for (; k < depth; ++k)
        for (std::int64_t p = 0; p < kLanes<T>; ++p) out[k * kNr + c + p] = b[(c + p) * block.ldb + k];
    }
    for (; c < width; ++c)
      for (std::int64_t k = 0; k < depth; ++k) out[k * kNr + c] = b[c * block.ldb + k];
    for (; c < kNr; ++c)
      for (std::int64_t k = 0; k < depth; ++k) out[k * kNr + c] = T(0);
  }
}

/// C[rows, columns] = alpha * A * B + beta * C for at most MR rows of A against packed panels of B.
template <typename T>
struct TileRow {
  std::int64_t rows, columns, depth;
  const T* a;
  Strides stride;
  const T* panels;
  T alpha, beta;
  T* c;
  std::int64_t ldc;

  /// C is written along its rows, so that its lines stream; whole panels go straight to C, the last columns through a
  /// small tile.
  void multiply() const {
    constexpr std::int64_t kNr = Tile<T>::kColumns;
    const Kernel<T> kernel = kKernels<T>[static_cast<std::size_t>(rows - 1)];
    std::int64_t j = 0;
    for (; j + kNr <= columns; j += kNr) kernel(depth, a, stride, panels + j * depth, alpha, beta, c + j, ldc);
    if (j == columns) return;
    alignas(64) T tile[Tile<T>::kRows * kNr];
    kernel(depth, a, stride, panels + j * depth, alpha, T(0), tile, kNr);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t k = j; k < columns; ++k)
        c[i * ldc + k] = tile[i * kNr + k - j] + (beta == T(0) ? T(0) : beta * c[i * ldc + k]);
  }
};

}  // namespace kiln::tiles

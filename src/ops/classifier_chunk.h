#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/parallel.h"
#include "ops/gemm_tiles.h"
#include "ops/simd.h"

// The classifier's CPU kernel for one chunk of tokens. Private to classifier.cpp.
//
// The vocabulary passes in blocks, so small that a tile of logits is turned into its softmax and multiplied by the
// weights again before it leaves L1. With m the running maximum of a row (Milakov & Gimelshein 2018, "Online normalizer
// calculation for softmax"), e = e^(logit - m) as m stood at its block, and f = scale / sum of a row,
//   dx = f sum_blocks(e W) - scale W[target],    the sum rescaled whenever m grows;
//   dw = e' (f e^(m at the block - m) x) - scale x at row target,    for which e waits in memory until f is known.
namespace kiln::classifier {

using tiles::Tile;

/// Sizes of a chunk, and where its scratch lies, in elements.
template <typename T>
struct Layout {
  std::int64_t rows, width, vocab;
  bool gradient;

  static constexpr std::int64_t kTile = Tile<T>::kRows, kPanel = Tile<T>::kColumns;
  static constexpr std::int64_t kGroup = 4 * kTile;  // columns of dw at a time: whole tiles, and whole vectors

  /// Columns of logits in a block: both packed forms of its weights stay in L2, a tile of its softmax in L1.
  std::int64_t block() const {
    constexpr std::int64_t kCacheElements = (384 << 10) / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t most = std::clamp(kCacheElements / width / kPanel, std::int64_t{1}, std::int64_t{12}) * kPanel;
    return std::min(most, tiles::padded_columns<T>(vocab));
  }
  std::int64_t blocks() const { return (vocab + block() - 1) / block(); }

  std::int64_t softmax() const { return gradient ? blocks() * block() * rows : 0; }
  std::int64_t peaks() const { return blocks() * rows; }
  std::int64_t transposed_x() const { return gradient ? width * rows : 0; }
  std::int64_t shared() const { return softmax() + peaks() + transposed_x() + 2 * rows; }
  std::int64_t per_thread() const {
    const std::int64_t forward = block() * (width + kTile), backward = block() * tiles::padded_columns<T>(width);
    return gradient ? std::max(forward + backward, kGroup * (rows + block()) + rows) : forward;
  }
};

template <typename T>
struct Chunk {
  Layout<T> size;
  const T *x, *w;
  const std::int32_t* targets;
  std::int32_t ignored_target;
  T scale;
  T *losses, *dx, *dw;  // dx and dw only with `gradient`
  bool accumulate;      // add to dw
  T* scratch;           // shared(), then per_thread() for each of `threads`
  std::int64_t threads;

  void run() const {
    share((size.rows + size.kTile - 1) / size.kTile, [this](std::int64_t begin, std::int64_t end, T* own) {
      forward(begin * size.kTile, std::min(size.rows, end * size.kTile), own);
    });
    if (!size.gradient) return;
    share(size.blocks(), [this](std::int64_t begin, std::int64_t end, T* own) {
      for (std::int64_t b = begin; b < end; ++b) weight_gradient(b, own);
    });
  }

 private:
  T* softmax() const { return scratch; }  // panels [columns/NR][rows][NR], block after block
  T* peaks(std::int64_t block) const { return softmax() + size.softmax() + block * size.rows; }
  T* transposed_x() const { return peaks(size.blocks()); }
  T* sums() const { return transposed_x() + size.transposed_x(); }
  T* factors() const { return sums() + size.rows; }

  /// body(begin, end, scratch) on one range of jobs a thread.
  template <typename Body>
  void share(std::int64_t jobs, const Body& body) const {
    // A thread pays for itself from about 10^5 multiply-adds.
    const std::int64_t useful = std::max<std::int64_t>(1, size.rows * size.width * size.vocab / 100'000);
    const std::int64_t slots = std::min({threads, jobs, useful});
    parallel_for(slots, 1, [&](std::int64_t begin, std::int64_t end) {
      body(jobs * begin / slots, jobs * end / slots, scratch + size.shared() + begin * size.per_thread());
    });
  }

  struct Span {
    std::int64_t first, columns, padded;
  };
  Span span(std::int64_t block) const {
    const std::int64_t first = block * size.block(), columns = std::min(size.block(), size.vocab - first);
    return {first, columns, tiles::padded_columns<T>(columns)};
  }
  bool counts(std::int64_t row) const { return targets[row] != ignored_target; }

  /// Losses and dx of tokens [begin, end): every block of the vocabulary against every tile of tokens.
  void forward(std::int64_t begin, std::int64_t end, T* own) const {
    T* const packed_logits = own;
    T* const tile = packed_logits + size.block() * size.width;
    T* const packed_dx = tile + size.kTile * size.block();
    std::fill(sums() + begin, sums() + end, T(0));
    std::fill(losses + begin, losses + end, T(0));
    for (std::int64_t b = 0; b < size.blocks(); ++b) {
      const Span s = span(b);
      const T* block = w + s.first * size.width;
      for (std::int64_t k = 0; k < size.width; k += Tile<T>::kDepth)
        tiles::pack<T>({Trans::yes, block + k, size.width}, std::min(Tile<T>::kDepth, size.width - k), s.columns,
                       packed_logits + k * s.padded);
      if (size.gradient) tiles::pack<T>({Trans::no, block, size.width}, s.columns, size.width, packed_dx);
      for (std::int64_t i = begin; i < end; i += size.kTile) {
        const std::int64_t count = std::min(size.kTile, end - i);
        logits(i, count, s, packed_logits, tile);
        for (std::int64_t r = 0; r < count; ++r) softmax_row(i + r, b, s, tile + r * s.padded);
        if (!size.gradient) continue;
        tiles::TileRow<T>{.rows = count,
                          .columns = size.width,
                          .depth = s.columns,
                          .a = tile,
                          .stride = {s.padded, 1},
                          .panels = packed_dx,
                          .alpha = T(1),
                          .beta = b == 0 ? T(0) : T(1),
                          .c = dx + i * size.width,
                          .ldc = size.width}
            .multiply();
      }
    }
    for (std::int64_t i = begin; i < end; ++i) finish_row(i);
  }

  void logits(std::int64_t row, std::int64_t count, const Span& s, const T* packed, T* tile) const {
    for (std::int64_t k = 0; k < size.width; k += Tile<T>::kDepth)
      tiles::TileRow<T>{.rows = count,
                        .columns = s.padded,
                        .depth = std::min(Tile<T>::kDepth, size.width - k),
                        .a = x + row * size.width + k,
                        .stride = {size.width, 1},
                        .panels = packed + k * s.padded,
                        .alpha = T(1),
                        .beta = k == 0 ? T(0) : T(1),
                        .c = tile,
                        .ldc = s.padded}
          .multiply();
    if (s.columns == s.padded) return;
    for (std::int64_t r = 0; r < count; ++r)
      std::fill(tile + r * s.padded + s.columns, tile + (r + 1) * s.padded, -std::numeric_limits<T>::infinity());
  }

  /// One row of a tile becomes e; the sums before it follow the maximum.
  void softmax_row(std::int64_t row, std::int64_t block, const Span& s, T* logits) const {
    constexpr int kLanes = simd::kLanes<T>;
    if (counts(row) && targets[row] >= s.first && targets[row] < s.first + s.columns)
      losses[row] = -logits[targets[row] - s.first];
    simd::Vector<T> most = simd::load(logits);
    for (std::int64_t j = kLanes; j < s.padded; j += kLanes) most = simd::max<T>(most, simd::load(logits + j));
    const T before = block == 0 ? -std::numeric_limits<T>::infinity() : peaks(block - 1)[row];
    const T peak = std::max(before, simd::reduce_max<T>(most));
    peaks(block)[row] = peak;
    if (block > 0 && peak > before) {
      const T shrink = std::exp(before - peak);
      sums()[row] *= shrink;
      if (size.gradient)
        for (std::int64_t c = 0; c < size.width; ++c) dx[row * size.width + c] *= shrink;
    }
    simd::Vector<T> sum{};
    T* kept = softmax() + (s.first * size.rows) + row * size.kPanel;
    for (std::int64_t j = 0; j < s.padded; j += size.kPanel, kept += size.rows * size.kPanel) {
      const simd::Vector<T> left = simd::exp<T>(simd::load(logits + j) - peak);
      const simd::Vector<T> right = simd::exp<T>(simd::load(logits + j + kLanes) - peak);
      sum += left + right;
      if (!size.gradient) continue;
      simd::store<T>(logits + j, left);
      simd::store<T>(logits + j + kLanes, right);
      simd::store<T>(kept, left);
      simd::store<T>(kept + kLanes, right);
    }
    sums()[row] += simd::reduce_sum<T>(sum);
  }

  void finish_row(std::int64_t row) const {
    losses[row] = counts(row) ? losses[row] + std::log(sums()[row]) + peaks(size.blocks() - 1)[row] : T(0);
    if (!size.gradient) return;
    const T share = counts(row) ? scale : T(0), factor = share / sums()[row];
    factors()[row] = factor;
    const T* target = w + (counts(row) ? targets[row] : 0) * size.width;
    T* out = dx + row * size.width;
    for (std::int64_t c = 0; c < size.width; ++c) {
      out[c] = factor * out[c] - share * target[c];
      transposed_x()[c * size.rows + row] = x[row * size.width + c];
    }
  }

  /// dw of one block of the vocabulary, a few columns at a time: dw' = (factor x)' e, transposed on its way out.
  void weight_gradient(std::int64_t block, T* own) const {
    const Span s = span(block);
    T* const factor = own;
    T* const scaled_x = factor + size.rows;
    T* const transposed = scaled_x + size.kGroup * size.rows;
    const T *peak = peaks(block), *last = peaks(size.blocks() - 1);
    for (std::int64_t i = 0; i < size.rows; ++i)
      factor[i] = peak[i] == last[i] ? factors()[i] : factors()[i] * std::exp(peak[i] - last[i]);
    for (std::int64_t c = 0; c < size.width; c += size.kGroup) {
      const std::int64_t columns = std::min(size.kGroup, size.width - c);
      for (std::int64_t r = 0; r < columns; ++r)
        for (std::int64_t i = 0; i < size.rows; ++i)
          scaled_x[r * size.rows + i] = transposed_x()[(c + r) * size.rows + i] * factor[i];
      for (std::int64_t r = 0; r < columns; r += size.kTile)
        tiles::TileRow<T>{.rows = std::min(size.kTile, columns - r),
                          .columns = s.padded,
                          .depth = size.rows,
                          .a = scaled_x + r * size.rows,
                          .stride = {size.rows, 1},
                          .panels = softmax() + s.first * size.rows,
                          .alpha = T(1),
                          .beta = T(0),
                          .c = transposed + r * s.padded,
                          .ldc = s.padded}
            .multiply();
      add_transposed(transposed, s.padded, columns, s.columns, dw + s.first * size.width + c);
    }
    for (std::int64_t i = 0; i < size.rows; ++i) {
      if (!counts(i) || targets[i] < s.first || targets[i] >= s.first + s.columns) continue;
      for (std::int64_t c = 0; c < size.width; ++c) dw[targets[i] * size.width + c] -= scale * x[i * size.width + c];
    }
  }

  /// out[column][row] (+)= from[row][column].
  void add_transposed(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, T* out) const {
    constexpr int kLanes = simd::kLanes<T>;
    auto put = [&](std::int64_t r, std::int64_t j) {
      T& to = out[j * size.width + r];
      to = from[r * stride + j] + (accumulate ? to : T(0));
    };
    std::int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      std::int64_t r = 0;
      for (; r + kLanes <= rows; r += kLanes) {
        simd::Vector<T> square[kLanes];
#pragma GCC unroll 16
        for (int p = 0; p < kLanes; ++p) square[p] = simd::load(from + (r + p) * stride + j);
        simd::transpose<T>(square);
        for (int p = 0; p < kLanes; ++p) {
          T* to = out + (j + p) * size.width + r;
          simd::store<T>(to, accumulate ? square[p] + simd::load(to) : square[p]);
        }
      }
      for (; r < rows; ++r)
        for (int p = 0; p < kLanes; ++p) put(r, j + p);
    }
    for (; j < columns; ++j)
      for (std::int64_t r = 0; r < rows; ++r) put(r, j);
  }
};

}  // namespace kiln::classifier

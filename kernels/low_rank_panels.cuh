#pragma once
#include <cuda_runtime.h>

#include <cstdint>

/// Operands of the tensor cores as they lie in shared memory, in global memory: a bf16 copy of a matrix that many
/// blocks read again and again is written once in this order, and then moves in bulk without a tensor map.
///
/// A panel has 128 rows; 64 columns of it are 16 KB, rows of 128 bytes whose 16-byte chunks are exchanged by
/// row % 8 (the 128-byte swizzle). The parts of a panel follow each other, then the next panel. The matrix is
/// filled up with zeros.
namespace kiln::cuda {

inline constexpr int kPanelRows = 128, kPanelColumns = 64;
inline constexpr int kPanelPartBytes = kPanelRows * kPanelColumns * 2;

__host__ __device__ inline int panel_parts(int columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }
__host__ __device__ inline int panel_count(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }

/// Where row 8 q + 2 j + e of 32 lies where rows are permuted: at 8 j + 2 q + e. A thread of wgmma has the sums of
/// columns 8 j + 2 q + {0, 1}; through this order they are eight that lie together. Its own inverse.
__device__ inline int permuted(int row) { return (row & ~30) | (row >> 3 & 3) << 1 | (row >> 1 & 3) << 3; }

/// Part `part` of the panel that starts at row `first` (a multiple of 64).
__device__ inline const std::uint16_t* panel_part(const std::uint16_t* panels, int columns, int first, int part) {
  const std::int64_t at = static_cast<std::int64_t>(first / kPanelRows) * panel_parts(columns) + part;
  return panels + at * (kPanelRows * kPanelColumns) + first % kPanelRows * kPanelColumns;
}

/// Elements [row][8 chunk ...] of a matrix of `columns`, the row already permuted.
__device__ inline uint4* panel_chunk(std::uint16_t* panels, int columns, int row, int chunk) {
  std::uint16_t* part = const_cast<std::uint16_t*>(panel_part(panels, columns, row / 64 * 64, chunk / 8));
  return reinterpret_cast<uint4*>(part) + row % 64 * 8 + (chunk % 8 ^ row % 8);
}

}  // namespace kiln::cuda

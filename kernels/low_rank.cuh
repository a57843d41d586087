#pragma once
#include "graph/parameter.h"
#include "kernels/low_rank.h"
#include "kernels/low_rank_tile.cuh"

/// What the kernels of the low-rank optimizers share: operands of TileProduct, and scalars.
namespace kiln::cuda {

/// A step whose gradient norm is not finite changes nothing.
__device__ inline bool skipped(const double* scalars) {
  return !isfinite(scalars[static_cast<int>(Scalar::grad_norm)]);
}

__device__ inline float square(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

/// The gradient as [vector, short side], and the sums of squares of its vectors on the way. Along the depth where
/// vectors are rows, along the rows of the operand where they are columns.
template <Contiguous kOrder>
struct GradientFetch {
  static constexpr bool kRight = kOrder == Contiguous::depth;
  const float* g;
  int vectors, side, pitch, first;
  float4 squares = make_float4(0, 0, 0, 0);  // right: of fetch i; left: of the four vectors

  __device__ GradientFetch(const LowRankMatrix& t, int first_vector)
      : g(t.g), vectors(t.vectors()), side(t.side()), pitch(t.n), first(first_vector) {}
  __device__ float4 operator()(int i, int row, int depth) {
    float4 x = make_float4(0, 0, 0, 0);
    const int vector = first + row;
    if (vector < vectors && depth < side)
      x = *reinterpret_cast<const float4*>(g + (kRight ? static_cast<std::int64_t>(vector) * pitch + depth
                                                       : static_cast<std::int64_t>(depth) * pitch + vector));
    if constexpr (kRight) {
      const float s = square(x);
      squares.x += i == 0 ? s : 0;
      squares.y += i == 1 ? s : 0;
      squares.z += i == 2 ? s : 0;
      squares.w += i == 3 ? s : 0;
    } else {
      squares.x += x.x * x.x;
      squares.y += x.y * x.y;
      squares.z += x.z * x.z;
      squares.w += x.w * x.w;
    }
    return x;
  }

  /// Adds up over threads, in a fixed order, and writes t.squares times `scale`. `shared` holds 1024 floats.
  __device__ void store_squares(const LowRankMatrix& t, int first_vector, float scale, float* shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kRight) {  // eight neighbours share a row
      float parts[4] = {squares.x, squares.y, squares.z, squares.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) parts[i] += __shfl_xor_sync(0xffffffffu, parts[i], offset);
        const int vector = first_vector + thread / 8 + 32 * i;
        if (thread % 8 == 0 && vector < vectors) t.squares[vector] = scale * parts[i];
      }
    } else {  // warps share columns
      reinterpret_cast<float4*>(shared)[thread] = squares;
      __syncthreads();
      if (thread >= kTile) return;
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kTileThreads / 32; ++warp) total += shared[warp * kTile + thread];
      if (first_vector + thread < vectors) t.squares[first_vector + thread] = scale * total;
    }
  }
};

/// A row-major f32 matrix [depth, columns] as an operand whose rows are its columns (kOrder rows), or [rows, depth]
/// read along the depth.
template <Contiguous kOrder>
struct BasisFetch {
  const float* data;
  int outer, inner, first;  // sizes of the matrix; first row of the operand

  __device__ BasisFetch(const float* matrix, int rows, int columns, int first_row)
      : data(matrix), outer(rows), inner(columns), first(first_row) {}
  __device__ float4 operator()(int, int row, int depth) const {
    const int major = kOrder == Contiguous::rows ? depth : first + row;
    const int minor = kOrder == Contiguous::rows ? first + row : depth;
    if (major >= outer || minor >= inner) return make_float4(0, 0, 0, 0);
    return *reinterpret_cast<const float4*>(data + static_cast<std::int64_t>(major) * inner + minor);
  }
};

}  // namespace kiln::cuda

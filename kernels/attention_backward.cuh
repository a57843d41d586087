#pragma once
#include <cmath>

#include "kernels/attention.h"
#include "kernels/attention_tile.cuh"

/// What the kernels of the backward pass share, and how attention_backward calls them.
namespace kiln::cuda {

/// Per query row, for the kernel of dk and dv: [B,H,Tpad] each, Tpad = T rounded up to 64. A row past the sequence has
/// lse +inf and delta 0, so that its probabilities are 0.
struct RowStatistics {
  float* lse;    // in base 2
  float* delta;  // sum_d do o
  int padded_tokens;

  __device__ std::int64_t at(const Schedule& s, int sequence, int head, int row) const {
    return (static_cast<std::int64_t>(sequence) * s.heads + head) * padded_tokens + row;
  }
};

/// The inverse rotation of RoPE on an accumulator [64, kD] whose thread holds rows row and row + 8: columns i and i +
/// D/2 turn by minus the angle of the row. All loads go out before the first is used; a row past the sequence, which is
/// never stored, takes the last row's angles.
template <int kD>
__device__ inline void rotate_back(float (&d)[kD / 2], const float* rope, int row, int tokens) {
  float2 cosine[2][kD / 16], sine[2][kD / 16];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* angles = rope + static_cast<std::int64_t>(min(row + 8 * h, tokens - 1)) * kD + threadIdx.x % 4 * 2;
#pragma unroll
    for (int t = 0; t < kD / 16; ++t) {
      cosine[h][t] = __ldg(reinterpret_cast<const float2*>(angles + 8 * t));
      sine[h][t] = __ldg(reinterpret_cast<const float2*>(angles + 8 * t + kD / 2));
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 4; ++i) {
    const int h = i / 2 % 2, t = i / 4;
    const float c = i % 2 == 0 ? cosine[h][t].x : cosine[h][t].y, s = i % 2 == 0 ? sine[h][t].x : sine[h][t].y;
    const float low = d[i], high = d[i + kD / 4];
    d[i] = low * c + high * s;
    d[i + kD / 4] = high * c - low * s;
  }
}

/// Also tells the compiler that the old values are dead, which a wgmma that overwrites them does not.
template <int kCount>
__device__ inline void clear(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = 0.f;
}

template <int kCount>
__device__ inline void scale_all(float (&d)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] *= factor;
}

// --- Products of tiles ----------------------------------------------------------------------------------------------

/// d = A B^T over the head dimension, both operands tiles of 64 rows.
template <int kD>
__device__ inline void issue_product(float (&d)[kRows / 2], std::uint32_t rows, std::uint32_t columns) {
  using Rows = Tile<kD, kRows>;
  fence_registers(d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kD / 16; ++step)
    wgmma<kRows>(d, Rows::by_column(rows, step), Rows::by_column(columns, step), step > 0);
  wgmma_commit();
}

/// d += A B, or d = A B, over the 64 rows of a tile B.
template <int kD>
__device__ inline void issue_gradient(float (&d)[kD / 2], const std::uint32_t (&a)[kRows / 16][4], std::uint32_t rows,
                                      bool accumulate) {
  fence_registers(d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step)
    wgmma<kD, Major::mn>(d, a[step], Tile<kD, kRows>::by_row(rows, step), accumulate || step > 0);
  wgmma_commit();
}

// --- Scores held transposed, keys by queries, so that p and ds are register operands of dv and dk --------------------

/// The scores s become probabilities. On the diagonal, queries before the key have none. `lse` is in base 2, `scale2`
/// is log2(e) / sqrt(D).
__device__ inline void probabilities(float (&s)[kRows / 2], const float* lse, float scale2, bool diagonal) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = (static_cast<int>(threadIdx.x) >> 5) & 3;
  const int key = warp * 16 + lane / 4, query = lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < kRows / 8; ++t) {
    const float2 offset = *reinterpret_cast<const float2*>(lse + 8 * t + query);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[4 * t + i] = exp2_approx(fmaf(s[4 * t + i], scale2, i % 2 == 0 ? -offset.x : -offset.y));
  }
  if (!diagonal) return;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i)
    if (i / 4 * 8 + query + i % 2 < key + i / 2 % 2 * 8) s[i] = 0.f;
}

/// ds = p (dp - delta).
__device__ inline void score_gradient(std::uint32_t (&ds)[kRows / 16][4], const float (&p)[kRows / 2],
                                      const float (&dp)[kRows / 2], const float* delta) {
#pragma unroll
  for (int t = 0; t < kRows / 8; ++t) {
    const float2 mean = *reinterpret_cast<const float2*>(delta + 8 * t + static_cast<int>(threadIdx.x) % 4 * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * t + 2 * h;
      ds[t / 2][t % 2 * 2 + h] = pack_bf16(p[i] * (dp[i] - mean.x), p[i + 1] * (dp[i + 1] - mean.y));
    }
  }
}

// --- Work -----------------------------------------------------------------------------------------------------------

/// First row of a warpgroup in a work item: roles rotate from item to item, since rows differ in work.
template <int kWarpgroups>
__device__ inline int owned_row(const WorkItem& work, int warpgroup, int n) {
  return (work.tile * kWarpgroups + (warpgroup + n) % kWarpgroups) * kRows;
}

// --- Host -----------------------------------------------------------------------------------------------------------

struct GradientMaps {
  CUtensorMap qkv, o, dout, dqkv;
};

inline GradientMaps gradient_maps(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args) {
  const std::int64_t width = shape.heads * shape.head_dim;
  return {head_tensor_map(args.qkv, shape, rows, shape.columns()), head_tensor_map(args.o, shape, rows, width),
          head_tensor_map(args.dout, shape, rows, width), head_tensor_map(args.dqkv, shape, rows, shape.columns())};
}

inline float score_scale(const AttentionShape& shape) { return 1.f / std::sqrt(static_cast<float>(shape.head_dim)); }

inline std::int64_t padded_tokens(const AttentionShape& shape) { return (shape.seq_len + kRows - 1) / kRows * kRows; }

inline RowStatistics row_statistics(const AttentionShape& shape, std::int64_t rows, void* workspace) {
  const std::int64_t count = rows / shape.seq_len * shape.heads * padded_tokens(shape);
  auto* lse = static_cast<float*>(workspace);
  return {lse, lse == nullptr ? nullptr : lse + count, static_cast<int>(padded_tokens(shape))};
}

/// dq, and the statistics that attention_key_gradient reads.
void attention_query_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                              cudaStream_t stream);
/// dk and dv.
void attention_key_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                            cudaStream_t stream);

void attention_fused_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                              cudaStream_t stream);

}  // namespace kiln::cuda

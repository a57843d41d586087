#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/row_order.h"
#include "ops/attention_shape.h"

namespace kiln::cuda {

/// Operands of causal grouped-query attention on Hopper (sm_90a), o_i = sum_{j<=i} softmax_j(q_i k_j / sqrt(D)) v_j
/// within each sequence of T rows. N = B T rows; every pointer is aligned to 16 bytes.
///
/// in     qkv [N,(H+2Hkv)D] bf16, after RoPE
/// out    o [N,HD] bf16    lse [N,H] f32: natural logarithm of sum_j exp(q_i k_j / sqrt(D))
/// stream enqueues one kernel; capturable; bitwise deterministic
/// paper  Shah et al. 2024, arXiv:2407.08608 (warp specialisation); Dao 2023, arXiv:2307.08691
struct AttentionForward {
  const __nv_bfloat16* qkv = nullptr;
  __nv_bfloat16* o = nullptr;
  float* lse = nullptr;
  RowOrder order = RowOrder::ascending;  // of the sequences
};

/// in     qkv, o, lse as above    dout [N,HD] bf16
///        rope [P,D] f32 or null, P >= T: cosines in columns [0,D/2), sines in [D/2,D), row = position in the sequence
/// out    dqkv [N,(H+2Hkv)D] bf16, every element written; a key head's gradient sums its query heads in order.
///        With `rope`, dq and dk are rotated back: dqkv is the gradient of the projection before RoPE.
/// stream enqueues one kernel for sequences of up to 256 with heads of 32 or 64 and H = Hkv, else two, for dq and for
///        dk and dv; capturable; bitwise deterministic, without atomics
struct AttentionBackward {
  const __nv_bfloat16* qkv = nullptr;
  const __nv_bfloat16* o = nullptr;
  const float* lse = nullptr;
  const __nv_bfloat16* dout = nullptr;
  const float* rope = nullptr;
  __nv_bfloat16* dqkv = nullptr;
  void* workspace = nullptr;             // attention_backward_workspace_bytes, aligned to 256 bytes
  RowOrder order = RowOrder::ascending;  // of the sequences; two kernels take them in turn, there and back
};

/// Whether these kernels take the shape: D is 32, 64 or 128, and H is a multiple of Hkv.
bool attention_supported(const AttentionShape& shape);

/// Whether one kernel can compute dq, dk and dv: sequences of up to 256, heads of 32 or 64, as many key heads as heads.
bool attention_gradient_fuses(const AttentionShape& shape);

/// Two f32 per row and query head, rows of a sequence padded to 64; nothing where one kernel does it all.
std::size_t attention_backward_workspace_bytes(const AttentionShape& shape, std::int64_t rows);

/// Fails unless the shape is supported and `rows` is a positive multiple of T.
void check_attention(const AttentionShape& shape, std::int64_t rows);

/// error  as check_attention
void attention_forward(const AttentionShape& shape, std::int64_t rows, const AttentionForward& args,
                       cudaStream_t stream);
void attention_backward(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                        cudaStream_t stream);

}  // namespace kiln::cuda

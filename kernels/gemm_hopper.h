#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/row_order.h"

/// GEMMs for Hopper whose epilogue saves a pass through device memory. All matrices are row-major bf16 with f32 sums;
/// device pointers are 16-byte aligned. Every launcher enqueues on `stream`, allocates nothing, is capturable in a CUDA
/// graph, gives bitwise the same result on every run and writes nothing outside its outputs. `tile` picks one of
/// three tile configurations for benchmarks; -1 picks by shape.
/// error  Error(usage) where ..._supported is false; Error(resource) where the launch fails
namespace kiln::cuda {

/// Largest logit - shift that counts: beyond it the exponential is cut, so that sums stay finite and a row whose shift
/// is its target's logit never overflows. Such a token's loss, over 75 nats, is then read low.
inline constexpr float kLargestExponent = 75.0f;

/// Classifier: E = exp(X W^T - shift) and what the cross-entropy needs, without ever storing logits.
/// in     x [M,C]    w [V,C]    shift [M] f32, near each row's largest logit; a row whose logits are all 87
///        below it sums to 0
///        targets [M] i32, outside [0, v_true) = ignored    v_true <= V, the columns from there on are padding
/// out    e [M,V], 0 in the padding; null = only sums and target logits (evaluation)
///        partial_sums [gemm_logits_parts(V), M] f32, sums of the bf16-rounded e over a tile's columns
///        target_logits [M] f32, the unrounded, unshifted logit; not written for ignored rows
struct GemmLogits {
  const __nv_bfloat16* x = nullptr;
  const __nv_bfloat16* w = nullptr;
  const float* shift = nullptr;
  const int* targets = nullptr;
  __nv_bfloat16* e = nullptr;
  float* partial_sums = nullptr;
  float* target_logits = nullptr;
  int m = 0, c = 0, v = 0, v_true = 0;
  int tile = -1;
  RowOrder order = RowOrder::ascending;
};
bool gemm_logits_supported(int m, int c, int v);
int gemm_logits_parts(int v, int tile = -1);
void gemm_logits_exp(const GemmLogits& args, cudaStream_t stream);

/// SwiGLU: [gate, up] = X W^T and A = silu(gate) up, A from the bf16-rounded gate and up that backward reads.
/// in     x [M,C]    w [2F,C], gate rows first    C % 8 == 0, F % 8 == 0
/// out    gate_up [M,2F]    a [M,F]
/// paper  Shazeer 2020, arXiv:2002.05202
struct GemmSwiglu {
  const __nv_bfloat16* x = nullptr;
  const __nv_bfloat16* w = nullptr;
  __nv_bfloat16* gate_up = nullptr;
  __nv_bfloat16* a = nullptr;
  int m = 0, c = 0, f = 0;
  int tile = -1;
  RowOrder order = RowOrder::ascending;
};
bool gemm_swiglu_supported(int m, int c, int f);
void gemm_swiglu(const GemmSwiglu& args, cudaStream_t stream);

/// Backward of SwiGLU through the down projection: dA = dY W, never stored, and with s = sigmoid(gate)
/// dgate = dA up s (1 + gate (1 - s)),  dup = dA gate s.
/// in     dy [M,C]    w [C,F]    gate_up [M,2F]    C % 8 == 0, F % 8 == 0
/// out    dgate_up [M,2F], may be gate_up itself
struct GemmSwigluBackward {
  const __nv_bfloat16* dy = nullptr;
  const __nv_bfloat16* w = nullptr;
  const __nv_bfloat16* gate_up = nullptr;
  __nv_bfloat16* dgate_up = nullptr;
  int m = 0, c = 0, f = 0;
  int tile = -1;
  RowOrder order = RowOrder::ascending;
};
bool gemm_swiglu_backward_supported(int m, int c, int f);
void gemm_swiglu_backward(const GemmSwigluBackward& args, cudaStream_t stream);

/// Projection to queries, keys and values with rotary embedding (rotate-half) on the first `rotated_heads` heads:
/// (a, b) at i and i + D/2 become (a cos - b sin, b cos + a sin) at position row % T.
/// in     x [M,C]    w [N,C]    table [T,D] f32: cos in columns [0,D/2), sin in [D/2,D)    N % D == 0, D 32, 64 or 128
/// out    qkv [M,N]
/// paper  Su et al. 2021, arXiv:2104.09864
struct GemmRope {
  const __nv_bfloat16* x = nullptr;
  const __nv_bfloat16* w = nullptr;
  const float* table = nullptr;
  __nv_bfloat16* qkv = nullptr;
  int m = 0, n = 0, c = 0;
  int head_size = 64, rotated_heads = 0, tokens = 0;
  int tile = -1;
  RowOrder order = RowOrder::ascending;
};
bool gemm_rope_supported(int m, int n, int c, int head_size);
void gemm_rope(const GemmRope& args, cudaStream_t stream);

}  // namespace kiln::cuda

#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/state_pointer.h"

/// LoRA and ReLoRA on the GPU (optim/lora.h), one matrix at a time: elementwise passes between cuBLASLt's products of
/// kernels/lora.cpp.
namespace kiln::cuda {

/// One matrix W [m,n] with its factors; m, n and r are multiples of eight.
struct LoraMatrix {
  std::uint16_t *w, *low;      // bf16; lower halves of the f32 masters, null: stochastic rounding
  const void* g;               // f32 or bf16
  float *a, *b;                // [r,n], [m,r]
  StatePointer moments[2][2];  // of A and of B: first and second
  StatePrecision states;       // of theirs
  const CodeMaps* maps;        // in device memory, where they are int8
  std::uint64_t stream;        // of A, and of the weights' stochastic rounding
  std::int32_t m, n, r;
  std::int32_t own_n;      // without padding, where A is zero
  std::int64_t pruned[2];  // so many of the smallest second moments go at a restart, those of padding among them
  bool half_gradient, decay;
  bool restart;                        // ReLoRA
  std::int32_t every, offset, rewarm;  // steps
  double beta1, beta2, eps, weight_decay;
  double scale;  // s
  std::uint64_t seed;
  const double* scalars;
  // workspace
  std::uint16_t* left;   // bf16 [m,2r]: B before the step, and its change
  std::uint16_t* right;  // bf16 [2r,n]: A before the step, later its change; A after the step
  std::uint16_t* half;   // bf16 [m,n]: G, where it is f32
  float *db, *da;        // [m,r], [r,n]: G A' and B' G
  float* product;        // [m,n]: left right
  float* thresholds;     // [2]: the least second moments of A and B that stay
  cudaStream_t stream_of_work;
};

/// At a restart: what thresholds says. Else nothing. A block a factor, in four passes over its second moments.
void lora_thresholds(const LoraMatrix& t);
/// Draws A and clears B where that is due; then their halves `left` and `right` before the step, and G's.
/// floor  6 bytes for each of (m + n) r elements, and 6 for each of m n where G is f32
void lora_begin(const LoraMatrix& t);
/// Adam on A and B, their moments pruned before where that is due; `left` and `right`.
/// floor  28 bytes for each of (m + n) r elements, 20 with moments in bf16, 16 in int8
void lora_adam(const LoraMatrix& t);
/// W <- W + s product.
/// floor  12 bytes a parameter, 8 without masters
void lora_merge(const LoraMatrix& t);

}  // namespace kiln::cuda

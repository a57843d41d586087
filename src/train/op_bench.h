#pragma once
#include <string>
#include <vector>

#include "graph/backend.h"
#include "ops/attention_shape.h"

namespace kiln {

// Single ops at the sizes of training, on any device and in its dtype: medians of `repeats` runs enqueued one after the
// other, on random numbers that exceed a GPU's caches.

struct AttentionRate {
  AttentionShape shape;
  std::int64_t sequences = 0;
  double forward_seconds = 0, backward_seconds = 0;
  /// 4 B H T^2 D / 2, the causal half; backward counts 2.5 times that.
  double forward_flops() const;
  double forward_flops_per_s() const { return forward_flops() / forward_seconds; }
  double backward_flops_per_s() const { return 2.5 * forward_flops() / backward_seconds; }
};
/// Causal attention of width 1024 at T 256, 1024, 2048 and 4096 and D 64 and 128; a batch holds `tokens` tokens at T
/// 256, half as many at longer T, and at least one sequence.
std::vector<AttentionRate> bench_attention(Backend& backend, std::int64_t tokens, int repeats);

/// One GEMM of a model's step, C[m,n] of depth k, alone or with what follows it in its kernel.
struct ModelGemm {
  std::string model{}, name{};
  std::int64_t m = 0, n = 0, k = 0;
  bool one_kernel = true;  // false: the device runs the pair's ops apart
  double seconds = 0;
  double flops_per_s() const;
};
struct ModelGemmBench {
  double copy_bytes_per_s = 0;     // read and written, of a copy within the device
  double ceiling_flops_per_s = 0;  // one GEMM of 8192^3 (on the CPU 1024^3)
  std::vector<ModelGemm> gemms;
};
/// Tokens of a usual micro-batch on a GPU, of a model of this width: whole sequences of 256, whose activations exceed
/// the caches.
std::int64_t gpu_bench_tokens(std::int64_t hidden);

/// Every GEMM of the presets' training step at `tokens` tokens; 0: those of a usual micro-batch of each preset.
ModelGemmBench bench_model_gemms(Backend& backend, const std::vector<std::string>& presets, std::int64_t tokens,
                                 int repeats);

}  // namespace kiln

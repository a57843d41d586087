#pragma once
#include <string>
#include <vector>

#include "graph/backend.h"
#include "train/config.h"
#include "train/train_plan.h"

namespace kiln {

struct StepBenchOptions {
  LlamaConfig model;
  OptimizerOptions optimizer;
  BatchShape batch{8, 256};  // a micro-batch
  int micro_batches = 1;
  int steps = 5;
  Device device = Device::automatic;
  double clip_norm = 1.0;
  Recomputation recompute = {};
  bool masters = true;  // on a GPU: f32 masters, else bf16 with stochastic rounding
  GradientPrecision gradients = GradientPrecision::automatic;
  bool update_in_backward = false;
  bool by_op = true;      // StepBench::ops, from further steps
  bool by_shape = false;  // with a row of them for every shape of the first two inputs
};

/// Seconds per step of one kind of node.
struct OpTime {
  std::string op;
  double seconds = 0, flops = 0, bytes = 0;  // a step
};

struct StepBench {
  std::string device;
  std::size_t device_bytes = 0;                  // allocated on the device; 0 on the CPU, where buffers are not tracked
  double step_seconds = 0;                       // median
  double mean_seconds = 0, slowest_seconds = 0;  // refreshes of a projector are in some steps only
  double tokens_per_s = 0;
  double step_flops = 0;        // by LlamaConfig::flops_per_token, the definition of MFU
  double gemm_flops_per_s = 0;  // CPU: measured before and after the steps (the larger); GPU: as published
  std::string gemm_library;     // whose
  double loss = 0;
  std::vector<OpTime> ops;  // longest first
  double gemm_fraction() const { return step_flops / step_seconds / gemm_flops_per_s; }
};

/// Times whole training steps (forward, backward, clipping, update) on synthetic tokens, after two warm-up steps.
StepBench bench_step(const StepBenchOptions& options);
/// On a device that is open already, whose GEMM plans it then shares; `options.device` does not count.
StepBench bench_step(const StepBenchOptions& options, Backend& backend);

/// Rate of one f32 GEMM.
struct GemmRate {
  std::string library;  // "kiln", "Eigen 3.4.0", "OpenBLAS"
  double flops_per_s = 0;
};
/// C[m,n] = A[m,k] B'[n,k] by every library of this build, all threads, the best of `repeats`, interleaved.
std::vector<GemmRate> bench_gemm(std::int64_t m, std::int64_t n, std::int64_t k, int repeats);

/// The ceiling that bench_step reports against: the fastest library other than kiln at 2048 x 2048 x 2048.
GemmRate gemm_ceiling();

}  // namespace kiln

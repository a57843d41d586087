#include "optim/adam.h"

#include <cmath>
#include <vector>

#include "graph/parameter.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/split_master.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8, kBlock = kThreads * kPerThread;

/// One parameter; everything [n], aligned to eight elements.
struct Target {
  std::uint16_t* w;    // bf16
  std::uint16_t* low;  // lower halves of the f32 masters; null: stochastic rounding
  const float* g;
  void *m, *v;  // f32 or bf16
  std::int64_t n;
  std::uint64_t stream;  // of stochastic rounding
  double beta1, beta2, weight_decay;
  float eps;
  bool pytorch;
};
/// kBlock elements of one target.
struct Piece {
  int target;
  std::int64_t first;
};

/// What is the same for all elements of a target, rounded once from f64 as on the CPU.
struct Constants {
  float b1, b2, c1, c2, root, rate, before, after;
};
__device__ Constants constants(const Target& t, const double* scalars) {
  const double step = scalars[static_cast<int>(Scalar::step)], lr = scalars[static_cast<int>(Scalar::lr)];
  const double correction1 = 1.0 - pow(t.beta1, step), correction2 = 1.0 - pow(t.beta2, step);
  const double decay = 1.0 - lr * t.weight_decay;
  return {static_cast<float>(t.beta1),
          static_cast<float>(t.beta2),
          static_cast<float>(1.0 - t.beta1),
          static_cast<float>(1.0 - t.beta2),
          static_cast<float>(t.pytorch ? sqrt(correction2) : 1.0),
          static_cast<float>(t.pytorch ? lr / correction1 : lr * sqrt(correction2) / correction1),
          static_cast<float>(t.pytorch ? decay : 1.0),
          static_cast<float>(t.pytorch ? 1.0 : decay)};
}

/// Bytes an element: w, low, m and v are read and written, g is read: 28 with masters and f32 states, 16 with bf16
/// everywhere but g. All parameters in one launch.
template <typename State>
__global__ void __launch_bounds__(kThreads)
    update(const Target* targets, const Piece* pieces, int count, const double* scalars, std::uint64_t seed) {
  if (!isfinite(scalars[static_cast<int>(Scalar::grad_norm)])) return;
  const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
  const std::uint64_t key = rounding_seed(seed, scalars[static_cast<int>(Scalar::step)]);
  __shared__ Constants shared;
  int current = -1;
  for (int p = static_cast<int>(blockIdx.x); p < count; p += static_cast<int>(gridDim.x)) {
    const Piece piece = pieces[p];
    const Target& t = targets[piece.target];
    if (piece.target != current) {
      __syncthreads();
      if (threadIdx.x == 0) shared = constants(t, scalars);
      __syncthreads();
      current = piece.target;
    }
    const Constants c = shared;
    const std::int64_t i = piece.first + threadIdx.x * kPerThread;
    if (i >= t.n) continue;
    State *moments = static_cast<State*>(t.m) + i, *squares = static_cast<State*>(t.v) + i;
    const Float8 g = load_state(t.g + i);
    Float8 m = load_state(moments), v = load_state(squares);
    Master8 w(t.w, t.low, i);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const float x = clip * g.v[k];
      m.v[k] = c.b1 * m.v[k] + c.c1 * x;
      v.v[k] = c.b2 * v.v[k] + c.c2 * x * x;
      w.value.v[k] = c.after * (c.before * w.value.v[k] - c.rate * m.v[k] / (sqrtf(v.v[k]) / c.root + t.eps));
    }
    store_state(moments, m, key, t.stream + 1, i);
    store_state(squares, v, key, t.stream + 2, i);
    w.store(t.w, t.low, i, key, t.stream);
  }
}

/// All neighbouring Adam updates of a plan in one launch.
class AdamKernel final : public Kernel {
 public:
  AdamKernel(const Nodes& nodes, Context& context) : stream_(context.stream), blocks_(8 * context.multiprocessors) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) ops_.push_back(&nodes.op<AdamUpdate>(i));
    std::size_t pieces = 0;
    for (const AdamUpdate* op : ops_) pieces += blocks_for(op->parameter().shape.numel(), kBlock);
    targets_ = context.allocate(ops_.size() * sizeof(Target), "table of updates");
    pieces_ = context.allocate(pieces * sizeof(Piece), "table of updates");
  }

  void bind(std::span<const KernelArgs> nodes) override {
    std::vector<Target> targets;
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      const UpdateArgs a = ops_[i]->arguments(nodes[i]);
      const AdamUpdate::Options& o = ops_[i]->options();
      const std::int64_t n = a.w.numel();
      require(n % kPerThread == 0, "adam_update: {} of {} elements, expected a multiple of {}",
              ops_[i]->parameter().name, n, kPerThread);
      targets.push_back({.w = static_cast<std::uint16_t*>(a.w.data),
                         .low = static_cast<std::uint16_t*>(a.low.data),
                         .g = a.g.as<float>(),
                         .m = a.states[0].data,
                         .v = a.states[1].data,
                         .n = n,
                         .stream = ops_[i]->stream(),
                         .beta1 = o.beta1,
                         .beta2 = o.beta2,
                         .weight_decay = ops_[i]->parameter().decay ? o.weight_decay : 0.0,
                         .eps = static_cast<float>(o.eps),
                         .pytorch = o.form == AdamForm::pytorch});
      for (std::int64_t first = 0; first < n; first += kBlock) pieces.push_back({static_cast<int>(i), first});
    }
    count_ = static_cast<int>(pieces.size());
    copy_to_device(targets_, targets.data(), stream_);
    copy_to_device(pieces_, pieces.data(), stream_);
  }

  void run(std::span<const KernelArgs> nodes) override {
    const bool wide = nodes.front().in[3].dtype() == DType::f32;
    launch({"adam_update", static_cast<unsigned>(std::min(count_, blocks_)), kThreads, stream_},
           wide ? update<float> : update<bf16>, reinterpret_cast<const Target*>(targets_.data()),
           reinterpret_cast<const Piece*>(pieces_.data()), count_, nodes.front().in[2].as<double>(),
           ops_.front()->options().seed);
  }

 private:
  cudaStream_t stream_;
  int blocks_, count_ = 0;
  std::vector<const AdamUpdate*> ops_;
  Buffer targets_, pieces_;
};

std::unique_ptr<Kernel> make_adam(const Nodes& nodes, Context& context) {
  require(nodes.inputs()[0].dtype == DType::bf16, "adam_update: weights of {}, expected bf16",
          to_string(nodes.inputs()[0].dtype));
  const DType state = nodes.inputs()[3].dtype;
  require(state == DType::f32 || state == DType::bf16,
          "adam_update: states of {}; set optimizer.states to fp32 or bf16, or train on the CPU", to_string(state));
  return std::make_unique<AdamKernel>(nodes, context);
}

}  // namespace

OpEntry adam_entry() { return {.name = "adam_update", .make = make_adam, .any_count = true}; }

}  // namespace kiln::cuda

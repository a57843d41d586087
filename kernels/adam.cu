#include "optim/adam.h"

#include <cmath>
#include <vector>

#include "graph/parameter.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/state_access.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8, kBlock = kThreads * kPerThread;

/// One parameter; everything [n], aligned to eight elements.
struct Target {
  std::uint16_t* w;    // bf16
  std::uint16_t* low;  // lower halves of the f32 masters; null: stochastic rounding
  const void* g;
  StatePointer first, second;  // moments
  std::uint64_t stream;        // of the weights' stochastic rounding
  std::int64_t n;
  double beta1, beta2, weight_decay;
  float eps;
  bool pytorch;
  bool half_gradient;  // g is bf16, else f32
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

/// Bytes an element: w, low, m and v are read and written, g is read: 28 with masters, f32 states and f32 gradients; 14
/// with bf16 everywhere, 16 with masters, f32 gradients and 8-bit states. All parameters in one launch.
template <typename State>
__global__ void __launch_bounds__(kThreads) update(const Target* targets, const Piece* pieces, int count,
                                                   const double* scalars, std::uint64_t seed, const CodeMaps* maps) {
  if (!isfinite(scalars[static_cast<int>(Scalar::grad_norm)])) return;
  const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
  const std::uint64_t key = rounding_seed(seed, scalars[static_cast<int>(Scalar::step)]);
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  const StateAccess<State> access(maps, code_maps, kThreads);
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
    std::int64_t i = piece.first + threadIdx.x * kPerThread;
    if (access.done(i, t.n)) continue;
    const bool inside = i < t.n;
    if (!inside) i = piece.first;  // beside others of its warp: reads something, writes nothing
    const Float8 g = t.half_gradient ? load_state(static_cast<const bf16*>(t.g) + i)
                                     : load_state(static_cast<const float*>(t.g) + i);
    Float8 m = access.values(access.load(t.first, i), StateValues::any);
    Float8 v = access.values(access.load(t.second, i), StateValues::positive);
    Master8 w(t.w, t.low, i);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const float x = clip * g.v[k];
      m.v[k] = c.b1 * m.v[k] + c.c1 * x;
      v.v[k] = c.b2 * v.v[k] + c.c2 * x * x;
      w.value.v[k] = c.after * (c.before * w.value.v[k] - c.rate * m.v[k] / (sqrtf(v.v[k]) / c.root + t.eps));
    }
    access.store(t.first, i, m, StateValues::any, key, inside);
    access.store(t.second, i, v, StateValues::positive, key, inside);
    if (inside) w.store(t.w, t.low, i, key, t.stream);
  }
}

/// All neighbouring Adam updates of a plan in one launch.
class AdamKernel final : public Kernel {
 public:
  AdamKernel(const Nodes& nodes, Context& context) : stream_(context.stream), blocks_(8 * context.multiprocessors) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) ops_.push_back(&nodes.op<AdamUpdate>(i));
    state_ = nodes.inputs()[3].dtype;
    maps_ = make_code_maps(context, state_ == DType::u8);
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
      std::span<const Tensor> states = a.states;
      const StatePointer first_moment = take_state(states, ops_[i]->parameter(), "exp_avg"),
                         second_moment = take_state(states, ops_[i]->parameter(), "exp_avg_sq");
      targets.push_back({.w = static_cast<std::uint16_t*>(a.w.data),
                         .low = static_cast<std::uint16_t*>(a.low.data),
                         .g = a.g.data,
                         .first = first_moment,
                         .second = second_moment,
                         .stream = ops_[i]->stream(),
                         .n = n,
                         .beta1 = o.beta1,
                         .beta2 = o.beta2,
                         .weight_decay = ops_[i]->parameter().decay ? o.weight_decay : 0.0,
                         .eps = static_cast<float>(o.eps),
                         .pytorch = o.form == AdamForm::pytorch,
                         .half_gradient = a.g.dtype() == DType::bf16});
      for (std::int64_t first = 0; first < n; first += kBlock) pieces.push_back({static_cast<int>(i), first});
    }
    count_ = static_cast<int>(pieces.size());
    copy_to_device(targets_, targets.data(), stream_);
    copy_to_device(pieces_, pieces.data(), stream_);
  }

  void run(std::span<const KernelArgs> nodes) override {
    launch({"adam_update", static_cast<unsigned>(std::min(count_, blocks_)), kThreads, stream_},
           state_ == DType::f32    ? update<float>
           : state_ == DType::bf16 ? update<bf16>
                                   : update<std::uint8_t>,
           reinterpret_cast<const Target*>(targets_.data()), reinterpret_cast<const Piece*>(pieces_.data()), count_,
           nodes.front().in[2].as<double>(), ops_.front()->options().seed,
           reinterpret_cast<const CodeMaps*>(maps_.data()));
  }

 private:
  cudaStream_t stream_;
  int blocks_, count_ = 0;
  std::vector<const AdamUpdate*> ops_;
  DType state_ = DType::f32;
  Buffer targets_, pieces_, maps_;
};

std::unique_ptr<Kernel> make_adam(const Nodes& nodes, Context& context) {
  return std::make_unique<AdamKernel>(nodes, context);
}

void check_adam(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs();
  require(in[0].dtype == DType::bf16, "{}: weights of {}, expected bf16", nodes.node().op->name(),
          to_string(in[0].dtype));
  for (std::size_t i = 0; i < nodes.group.count; ++i) {
    const Parameter& parameter = nodes.op<AdamUpdate>(i).parameter();
    require(parameter.shape.numel() % kPerThread == 0, "{}: {} of {} elements, expected a multiple of {}",
            nodes.node().op->name(), parameter.name, parameter.shape.numel(), kPerThread);
  }
}

}  // namespace

OpEntry adam_entry() { return {.name = "adam_update", .make = make_adam, .check = check_adam, .any_count = true}; }
OpEntry adam8bit_entry() {
  return {.name = "adam8bit_update", .make = make_adam, .check = check_adam, .any_count = true};
}

}  // namespace kiln::cuda

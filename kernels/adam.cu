#include "optim/adam.h"

#include <cmath>
#include <vector>

#include "graph/parameter.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/philox.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 4, kBlock = kThreads * kPerThread;

/// One parameter; everything [n], aligned to four elements.
struct Target {
  std::uint16_t* w;    // bf16
  std::uint16_t* low;  // lower halves of the f32 masters; null: stochastic rounding
  const float* g;
  float *m, *v;
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

/// bf16 of `x`, up with the probability of the part that is cut off.
__device__ std::uint16_t round_stochastically(float x, std::uint32_t random) {
  const std::uint32_t bits = __float_as_uint(x);
  return static_cast<std::uint16_t>((bits + (random & 0xffffu)) >> 16);
}

/// 28 bytes an element with masters: reads w, low, g, m, v and writes w, low, m, v, all in one launch for all
/// parameters.
__global__ void __launch_bounds__(kThreads)
    update(const Target* targets, const Piece* pieces, int count, const double* scalars, std::uint64_t seed) {
  if (!isfinite(scalars[static_cast<int>(Scalar::grad_norm)])) return;
  const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
  __shared__ Constants shared;
  int current = -1;
  for (int p = static_cast<int>(blockIdx.x); p < count; p += static_cast<int>(gridDim.x)) {
    const Piece piece = pieces[p];
    const Target t = targets[piece.target];
    if (piece.target != current) {
      __syncthreads();
      if (threadIdx.x == 0) shared = constants(t, scalars);
      __syncthreads();
      current = piece.target;
    }
    const Constants c = shared;
    const std::int64_t i = piece.first + threadIdx.x * kPerThread;
    if (i >= t.n) continue;
    const float4 g = *reinterpret_cast<const float4*>(t.g + i);
    float4 m = *reinterpret_cast<const float4*>(t.m + i), v = *reinterpret_cast<const float4*>(t.v + i);
    ushort4 w = *reinterpret_cast<const ushort4*>(t.w + i);
    ushort4 low = make_ushort4(0, 0, 0, 0);
    uint4 random = make_uint4(0, 0, 0, 0);
    if (t.low != nullptr)
      low = *reinterpret_cast<const ushort4*>(t.low + i);
    else
      random = philox(seed ^ static_cast<std::uint64_t>(scalars[static_cast<int>(Scalar::step)]) * 0x9E3779B97F4A7C15u,
                      t.stream, static_cast<std::uint64_t>(i));
    auto one = [&](float grad, float& moment, float& square, std::uint16_t& high, std::uint16_t& rest,
                   std::uint32_t bits) {
      const float x = clip * grad;
      moment = c.b1 * moment + c.c1 * x;
      square = c.b2 * square + c.c2 * x * x;
      float value = __uint_as_float((static_cast<std::uint32_t>(high) << 16) +
                                    static_cast<std::uint32_t>(static_cast<std::int16_t>(rest)));
      value = c.after * (c.before * value - c.rate * moment / (sqrtf(square) / c.root + t.eps));
      if (t.low == nullptr) {
        high = round_stochastically(value, bits);
        return;
      }
      const std::uint32_t result = __float_as_uint(value);
      high = static_cast<std::uint16_t>((result + 0x8000u) >> 16);
      rest = static_cast<std::uint16_t>(result);
    };
    one(g.x, m.x, v.x, w.x, low.x, random.x);
    one(g.y, m.y, v.y, w.y, low.y, random.y);
    one(g.z, m.z, v.z, w.z, low.z, random.z);
    one(g.w, m.w, v.w, w.w, low.w, random.w);
    *reinterpret_cast<float4*>(t.m + i) = m;
    *reinterpret_cast<float4*>(t.v + i) = v;
    *reinterpret_cast<ushort4*>(t.w + i) = w;
    if (t.low != nullptr) *reinterpret_cast<ushort4*>(t.low + i) = low;
  }
}

/// All neighbouring Adam updates of a plan in one launch.
class AdamKernel final : public Kernel {
 public:
  AdamKernel(const Nodes& nodes, Context& context) : stream_(context.stream), blocks_(8 * context.multiprocessors) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) ops_.push_back(&nodes.op<AdamUpdate>(i));
    std::size_t pieces = 0;
    for (const AdamUpdate* op : ops_) pieces += blocks_for(op->parameter().shape.numel(), kBlock);
    targets_ = allocate(ops_.size() * sizeof(Target));
    pieces_ = allocate(pieces * sizeof(Piece));
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
                         .m = a.states[0].as<float>(),
                         .v = a.states[1].as<float>(),
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
    copy(targets_, targets.data(), targets.size() * sizeof(Target));
    copy(pieces_, pieces.data(), pieces.size() * sizeof(Piece));
  }

  void run(std::span<const KernelArgs> nodes) override {
    launch({"adam_update", static_cast<unsigned>(std::min(count_, blocks_)), kThreads, stream_}, update,
           reinterpret_cast<const Target*>(targets_.data()), reinterpret_cast<const Piece*>(pieces_.data()), count_,
           nodes.front().in[2].as<double>(), ops_.front()->options().seed);
  }

 private:
  static Buffer allocate(std::size_t bytes) {
    void* data = nullptr;
    check_cuda(cudaMalloc(&data, bytes), "cudaMalloc of the update's tables");
    return Buffer(static_cast<std::byte*>(data), bytes, [](std::byte* p) noexcept { cudaFree(p); });
  }
  void copy(const Buffer& to, const void* from, std::size_t bytes) const {
    check_cuda(cudaMemcpyAsync(to.data(), from, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  cudaStream_t stream_;
  int blocks_, count_ = 0;
  std::vector<const AdamUpdate*> ops_;
  Buffer targets_, pieces_;
};

std::unique_ptr<Kernel> make_adam(const Nodes& nodes, Context& context) {
  require(nodes.inputs()[0].dtype == DType::bf16, "adam_update: weights of {}, expected bf16",
          to_string(nodes.inputs()[0].dtype));
  return std::make_unique<AdamKernel>(nodes, context);
}

}  // namespace

OpEntry adam_entry() { return {.name = "adam_update", .make = make_adam, .any_count = true}; }

}  // namespace kiln::cuda

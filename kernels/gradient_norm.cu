#include "optim/gradient_norm.h"

#include <vector>

#include "graph/parameter.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/split_master.cuh"
#include "ops/loss_sum.h"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kPiece = 16384;  // elements whose squares one block sums

struct Piece {
  const void* g;
  int count;
  bool half;  // bf16, else f32
};

__device__ float to_f32(float x) { return x; }
__device__ float to_f32(bf16 x) { return __bfloat162float(x); }

/// Sum over the block's elements in f32 within a thread's strided share of eights, what is left in its first thread.
template <typename T>
__device__ double share_of(const T* g, int count) {
  const int eights = count / 8;
  float sum[8] = {};
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < eights; i += kThreads) {
    const Float8 x = load_state(g + 8 * i);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] += x.v[k] * x.v[k];
  }
  double mine = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) mine += static_cast<double>(sum[k]);
  if (threadIdx.x == 0)
    for (int i = eights * 8; i < count; ++i)
      mine += static_cast<double>(to_f32(g[i])) * static_cast<double>(to_f32(g[i]));
  return mine;
}

/// partial[p] = sum of squares of piece p: f32 within a thread's strided share, f64 across threads.
__global__ void __launch_bounds__(kThreads) squares(const Piece* pieces, double* partial) {
  __shared__ double scratch[kThreads / 32];
  const Piece piece = pieces[blockIdx.x];
  const double mine = piece.half ? share_of(static_cast<const bf16*>(piece.g), piece.count)
                                 : share_of(static_cast<const float*>(piece.g), piece.count);
  const double total = block_sum(mine, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(1024)
    finish(const double* partial, int count, double clip_norm, bool running, double* scalars) {
  __shared__ double scratch[32];
  double mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 1024) mine += partial[i];
  const double total = block_sum(mine, scratch);
  if (threadIdx.x != 0) return;
  const double loss = scalars[static_cast<int>(Scalar::loss)];
  const double before = running ? scalars[static_cast<int>(Scalar::grad_norm)] : 0.0;
  const double norm = isfinite(loss) ? sqrt(total + before * before) : loss;
  scalars[static_cast<int>(Scalar::grad_norm)] = norm;
  scalars[static_cast<int>(Scalar::clip_scale)] = clip_norm > 0 ? fmin(1.0, clip_norm / (norm + 1e-6)) : 1.0;
}

std::size_t piece_count(std::span<const TensorSpec> in) {
  std::size_t count = 0;
  for (const TensorSpec& spec : in.first(in.size() - 1)) count += blocks_for(spec.shape.numel(), kPiece);
  return count;
}

std::size_t workspace(const Nodes& nodes) { return piece_count(nodes.inputs()) * (sizeof(double) + sizeof(Piece)); }

class GradientNormKernel final : public Kernel {
 public:
  GradientNormKernel(const Nodes& nodes, Context& context)
      : stream_(context.stream), options_(nodes.op<GradientNorm>().options()) {
    table_ = context.allocate(piece_count(nodes.inputs()) * sizeof(Piece), "table of the gradient norm");
  }

  void bind(std::span<const KernelArgs> nodes) override {
    std::vector<Piece> pieces;
    const std::span<const Tensor> in = nodes.front().in;
    for (const Tensor& g : in.first(in.size() - 1)) {
      const bool half = g.dtype() == DType::bf16;
      require(half || g.dtype() == DType::f32, "gradient_norm: gradient of {}, expected f32 or bf16",
              to_string(g.dtype()));
      for (std::int64_t first = 0; first < g.numel(); first += kPiece)
        pieces.push_back({static_cast<const std::byte*>(g.data) + static_cast<std::size_t>(first) * size_of(g.dtype()),
                          static_cast<int>(std::min<std::int64_t>(kPiece, g.numel() - first)), half});
    }
    count_ = static_cast<int>(pieces.size());
    copy_to_device(table_, pieces.data(), stream_);
  }

  void run(std::span<const KernelArgs> nodes) override {
    auto* partial = static_cast<double*>(nodes.front().workspace.data);
    launch({"gradient_norm", static_cast<unsigned>(count_), kThreads, stream_}, squares,
           reinterpret_cast<const Piece*>(table_.data()), partial);
    launch({"gradient_norm", 1, 1024, stream_}, finish, partial, count_, options_.clip_norm, options_.running,
           nodes.front().in.back().as<double>());
  }

 private:
  cudaStream_t stream_;
  GradientNorm::Options options_;
  int count_ = 0;
  Buffer table_;
};

std::unique_ptr<Kernel> make_norm(const Nodes& nodes, Context& context) {
  return std::make_unique<GradientNormKernel>(nodes, context);
}

/// One block: strided shares, then threads in a fixed order.
__global__ void __launch_bounds__(1024)
    add_losses(const float* losses, std::int64_t n, bool accumulate, double* scalars) {
  __shared__ double scratch[32];
  double mine = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += 1024) mine += static_cast<double>(losses[i]);
  const double total = block_sum(mine, scratch);
  double& loss = scalars[static_cast<int>(Scalar::loss)];
  if (threadIdx.x == 0) loss = (accumulate ? loss : 0.0) + total;
}

std::unique_ptr<Kernel> make_loss_sum(const Nodes&, Context& context) {
  return simple_kernel([stream = context.stream](const KernelArgs& args) {
    launch({"loss_sum", 1, 1024, stream}, add_losses, args.in[0].as<float>(), args.in[0].numel(), args.accumulate,
           args.in[1].as<double>());
  });
}

}  // namespace

OpEntry gradient_norm_entry() { return {.name = "gradient_norm", .workspace_bytes = workspace, .make = make_norm}; }
OpEntry loss_sum_entry() { return {.name = "loss_sum", .make = make_loss_sum}; }

}  // namespace kiln::cuda

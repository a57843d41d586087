#include "ops/swiglu.h"

#include "kernels/context.h"
#include "kernels/gemm_hopper_ptx.cuh"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256;

/// The arithmetic of the fused projection (gemm_swiglu.cu), so that a product recomputed here has its bits.
using gemm::sigmoid_approx;

/// Vector i of the [N,F] side: its row and the offset of its gate in the [N,2F] side.
struct Place {
  std::int64_t gate, narrow;
  bool valid;
};
__device__ inline Place place(std::int64_t vectors, int width, RowOrder order) {
  const std::int64_t i = ordered_block(order) * kThreads + threadIdx.x;
  const int per_row = width / 8;
  const std::int64_t row = i / per_row;
  const std::int64_t column = (i - row * per_row) * 8;
  return {row * 2 * width + column, row * width + column, i < vectors};
}

__global__ void __launch_bounds__(kThreads)
    forward(const bf16* x, bf16* y, std::int64_t vectors, int width, RowOrder order) {
  const Place at = place(vectors, width, order);
  if (!at.valid) return;
  const Float8 gate = unpack(load8(x + at.gate)), up = unpack(load8(x + at.gate + width));
  Float8 out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = gate.v[i] * sigmoid_approx(gate.v[i]) * up.v[i];
  store8(y + at.narrow, pack(out));
}

__global__ void __launch_bounds__(kThreads)
    backward(const bf16* x, const bf16* dy, bf16* dx, std::int64_t vectors, int width, RowOrder order) {
  const Place at = place(vectors, width, order);
  if (!at.valid) return;
  const Float8 gate = unpack(load8_streaming(x + at.gate)), up = unpack(load8_streaming(x + at.gate + width));
  const Float8 d = unpack(load8_streaming(dy + at.narrow));
  Float8 dgate, dup;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float s = sigmoid_approx(gate.v[i]);
    dgate.v[i] = d.v[i] * up.v[i] * s * (1.0f + gate.v[i] * (1.0f - s));
    dup.v[i] = d.v[i] * gate.v[i] * s;
  }
  store8(dx + at.gate, pack(dgate));
  store8(dx + at.gate + width, pack(dup));
}

void check_width(const Nodes& nodes) {
  const TensorSpec x = nodes.inputs()[0];
  require(x.dtype == DType::bf16 && x.shape[1] % 16 == 0, "swiglu: x {} {}, expected bf16 and a width F in eights",
          to_string(x.dtype), x.shape.str());
}

std::unique_ptr<Kernel> make_forward(const Nodes&, Context& context) {
  return simple_kernel([order = context.turn(), stream = context.stream](const KernelArgs& args) {
    const std::int64_t vectors = args.out[0].numel() / 8;
    launch({"swiglu", blocks_for(vectors, kThreads), kThreads, stream}, forward,
           static_cast<const bf16*>(args.in[0].data), static_cast<bf16*>(args.out[0].data), vectors,
           static_cast<int>(args.out[0].shape()[1]), order);
  });
}

std::unique_ptr<Kernel> make_backward(const Nodes&, Context& context) {
  return simple_kernel([order = context.turn(), stream = context.stream](const KernelArgs& args) {
    const std::int64_t vectors = args.in[1].numel() / 8;
    launch({"swiglu_dx", blocks_for(vectors, kThreads), kThreads, stream}, backward,
           static_cast<const bf16*>(args.in[0].data), static_cast<const bf16*>(args.in[1].data),
           static_cast<bf16*>(args.out[0].data), vectors, static_cast<int>(args.in[1].shape()[1]), order);
  });
}

}  // namespace

OpEntry swiglu_entry() { return {.name = "swiglu", .make = make_forward, .check = check_width}; }
OpEntry swiglu_gradient_entry() { return {.name = "swiglu_dx", .make = make_backward, .check = check_width}; }

}  // namespace kiln::cuda

#include "ops/rope.h"

#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256;

struct RopeArgs {
  bf16* qkv;
  const float* table;
  const std::int32_t* first;
  std::int64_t pairs;  // rotated pairs of eight over all rows and heads
  int heads, half, columns, seq_len;
  float sign;
};

/// A thread rotates eight pairs (i, i + D/2) of one head.
__global__ void __launch_bounds__(kThreads) rotate(RopeArgs a) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.pairs) return;
  const int per_head = a.half / 8;
  const std::int64_t head_index = i / per_head;
  const int d = static_cast<int>(i - head_index * per_head) * 8;
  const std::int64_t row = head_index / a.heads;
  const int head = static_cast<int>(head_index - row * a.heads);
  bf16* p = a.qkv + row * a.columns + head * 2 * a.half + d;
  const float* cosine = a.table + (*a.first + row % a.seq_len) * 2 * a.half + d;
  const float* sine = cosine + a.half;
  Float8 x = unpack(load8(p)), y = unpack(load8(p + a.half));
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float c = cosine[k], s = a.sign * sine[k], before = x.v[k];
    x.v[k] = before * c - y.v[k] * s;
    y.v[k] = y.v[k] * c + before * s;
  }
  store8(p, pack(x));
  store8(p + a.half, pack(y));
}

void check_rope(const Nodes& nodes) {
  const std::int64_t head_dim = nodes.op<Rope>().shape().head_dim;
  require(nodes.inputs()[0].dtype == DType::bf16 && head_dim % 16 == 0,
          "rope: {} with heads of {}, expected bf16 and a multiple of 16", to_string(nodes.inputs()[0].dtype),
          head_dim);
}

std::unique_ptr<Kernel> make_rope(const Nodes& nodes, Context& context) {
  const Rope& op = nodes.op<Rope>();
  const AttentionShape shape = op.shape();
  const float sign = op.direction() == Rope::Direction::forward ? 1.0f : -1.0f;
  return simple_kernel([shape, sign, stream = context.stream](const KernelArgs& args) {
    const std::int64_t heads = shape.heads + shape.kv_heads;
    const RopeArgs a{.qkv = static_cast<bf16*>(args.in[0].data),
                     .table = args.in[1].as<float>(),
                     .first = args.in[2].as<std::int32_t>(),
                     .pairs = args.in[0].shape()[0] * heads * (shape.head_dim / 16),
                     .heads = static_cast<int>(heads),
                     .half = static_cast<int>(shape.head_dim / 2),
                     .columns = static_cast<int>(shape.columns()),
                     .seq_len = static_cast<int>(shape.seq_len),
                     .sign = sign};
    launch({"rope", blocks_for(a.pairs, kThreads), kThreads, stream}, rotate, a);
  });
}

}  // namespace

OpEntry rope_entry() { return {.name = "rope", .make = make_rope, .check = check_rope}; }
OpEntry rope_gradient_entry() { return {.name = "rope_dx", .make = make_rope, .check = check_rope}; }

}  // namespace kiln::cuda

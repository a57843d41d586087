#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"
#include "ops/attention.h"
#include "ops/last_row.h"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 128;

struct CachedArgs {
  const bf16* qkv;
  bf16 *keys, *values, *out;
  const std::int32_t* first;
  int heads, kv_heads, dim, columns;
  float scale;
};

/// Appends the new rows' keys and values to the cache.
__global__ void __launch_bounds__(kThreads) append(CachedArgs a) {
  const int width = a.kv_heads * a.dim, row = static_cast<int>(blockIdx.x);
  const std::int64_t to = std::int64_t{*a.first + row} * width;
  const bf16* from = a.qkv + std::int64_t{row} * a.columns + a.heads * a.dim;
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kThreads) {
    a.keys[to + c] = from[c];
    a.values[to + c] = from[width + c];
  }
}

/// A block a query and head: scores of all earlier keys in shared memory, softmax, weighted values. Generation reads
/// the cache once a head, which is what bounds it: 4 P D bytes.
__global__ void __launch_bounds__(kThreads) attend(CachedArgs a) {
  extern __shared__ float shared[];  // query [D], then scores [first + row + 1]
  __shared__ float scratch[kThreads / 32];
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int kv = head / (a.heads / a.kv_heads), keys = *a.first + row + 1, width = a.kv_heads * a.dim;
  float *query = shared, *scores = shared + a.dim;
  for (int d = static_cast<int>(threadIdx.x); d < a.dim; d += kThreads)
    query[d] = __bfloat162float(a.qkv[std::int64_t{row} * a.columns + head * a.dim + d]) * a.scale;
  __syncthreads();
  float peak = -INFINITY;
  for (int j = static_cast<int>(threadIdx.x); j < keys; j += kThreads) {
    const bf16* key = a.keys + std::int64_t{j} * width + kv * a.dim;
    float dot = 0;
    for (int d = 0; d < a.dim; d += 8) {
      const Float8 k = unpack(load8(key + d));
#pragma unroll
      for (int i = 0; i < 8; ++i) dot += query[d + i] * k.v[i];
    }
    scores[j] = dot;
    peak = fmaxf(peak, dot);
  }
  peak = block_max(peak, scratch);
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < keys; j += kThreads) {
    scores[j] = __expf(scores[j] - peak);
    sum += scores[j];
  }
  sum = block_sum(sum, scratch);  // its barriers also publish the scores
  for (int d = static_cast<int>(threadIdx.x); d < a.dim; d += kThreads) {
    float total = 0;
    for (int j = 0; j < keys; ++j)
      total += scores[j] * __bfloat162float(a.values[std::int64_t{j} * width + kv * a.dim + d]);
    a.out[(std::int64_t{row} * a.heads + head) * a.dim + d] = __float2bfloat16(total / sum);
  }
}

std::unique_ptr<Kernel> make_cached(const Nodes& nodes, Context& context) {
  const AttentionShape shape = nodes.op<CachedAttention>().shape();
  const std::vector<TensorSpec> in = nodes.inputs();
  const std::int64_t capacity = in[1].shape[0];
  const std::size_t shared = static_cast<std::size_t>(shape.head_dim + capacity) * sizeof(float);
  require(in[0].dtype == DType::bf16 && shape.head_dim % 8 == 0 && shared <= std::size_t{220} << 10,
          "cached_attention: {} heads of {} over a cache of {}, expected bf16, a multiple of 8 and at most {}",
          to_string(in[0].dtype), shape.head_dim, capacity, (220 << 10) / 4 - shape.head_dim);
  check_cuda(cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, 220 << 10),
             "cudaFuncSetAttribute");
  return simple_kernel([shape, shared, stream = context.stream](const KernelArgs& args) {
    const int rows = static_cast<int>(args.in[0].shape()[0]);
    const CachedArgs a{.qkv = static_cast<const bf16*>(args.in[0].data),
                       .keys = static_cast<bf16*>(args.in[1].data),
                       .values = static_cast<bf16*>(args.in[2].data),
                       .out = static_cast<bf16*>(args.out[0].data),
                       .first = args.in[3].as<std::int32_t>(),
                       .heads = static_cast<int>(shape.heads),
                       .kv_heads = static_cast<int>(shape.kv_heads),
                       .dim = static_cast<int>(shape.head_dim),
                       .columns = static_cast<int>(shape.columns()),
                       .scale = 1.0f / sqrtf(static_cast<float>(shape.head_dim))};
    const auto grid = static_cast<unsigned>(rows);
    launch({"cached_attention", grid, kThreads, stream}, append, a);
    launch({"cached_attention", dim3(grid, static_cast<unsigned>(a.heads)), kThreads, stream, shared}, attend, a);
  });
}

std::unique_ptr<Kernel> make_last_row(const Nodes&, Context& context) {
  return simple_kernel([stream = context.stream](const KernelArgs& args) {
    const Tensor last = args.in[0].rows(args.in[0].shape()[0] - 1, 1);
    check_cuda(cudaMemcpyAsync(args.out[0].data, last.data, last.bytes(), cudaMemcpyDeviceToDevice, stream),
               "cudaMemcpyAsync");
  });
}

}  // namespace

OpEntry cached_attention_entry() { return {.name = "cached_attention", .make = make_cached}; }
OpEntry last_row_entry() { return {.name = "last_row", .make = make_last_row}; }

}  // namespace kiln::cuda

#include "ops/embedding.h"

#include <cub/device/device_radix_sort.cuh>

#include "kernels/aligned.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 32;  // sorted positions that one block sums

__global__ void __launch_bounds__(kThreads)
    gather(const std::int32_t* tokens, const bf16* table, bf16* out, std::int64_t vectors, int per_row) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= vectors) return;
  const std::int64_t row = i / per_row;
  const std::int64_t column = i - row * per_row;
  store8(out + i * 8, load8(table + (std::int64_t{tokens[row]} * per_row + column) * 8));
}

__global__ void __launch_bounds__(kThreads) number(std::int32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < n) out[i] = i;
}

/// Tokens sorted stably, with their positions: the rows of one token are neighbours, in token order.
struct Sorted {
  const std::int32_t *tokens, *positions;
  int count;
};

struct SumArgs {
  Sorted sorted;
  const bf16* dy;
  float* dw;
  float* partial;  // [chunks, 2, width]: a run that began before the chunk, and one that goes on after it
  int width;
};

/// Adds the rows of each run (equal tokens) of one chunk. Runs inside the chunk go straight to dw; the parts of runs
/// that cross its borders wait for join_runs.
__global__ void sum_chunks(SumArgs a) {
  const int column = static_cast<int>(threadIdx.x) * 8;
  const int first = static_cast<int>(blockIdx.x) * kChunk, last = min(first + kChunk, a.sorted.count);
  const std::int32_t* tokens = a.sorted.tokens;
  bool from_before = first > 0 && tokens[first - 1] == tokens[first];
  Float8 sum{};
  for (int i = first; i < last; ++i) {
    const Float8 row = unpack(load8(a.dy + std::int64_t{a.sorted.positions[i]} * a.width + column));
#pragma unroll
    for (int k = 0; k < 8; ++k) sum.v[k] += row.v[k];
    const bool ends = i + 1 == a.sorted.count || tokens[i + 1] != tokens[i];
    if (!ends && i + 1 < last) continue;
    float* out = a.dw + std::int64_t{tokens[i]} * a.width + column;
    const bool crosses = from_before || !ends;
    if (crosses) out = a.partial + (std::int64_t{blockIdx.x} * 2 + (from_before ? 0 : 1)) * a.width + column;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      out[k] = crosses ? sum.v[k] : out[k] + sum.v[k];
      sum.v[k] = 0;
    }
    from_before = false;
  }
}

/// A block for each chunk in which a run begins that goes on after it: adds the run's parts in order.
__global__ void join_runs(SumArgs a) {
  const int chunk = static_cast<int>(blockIdx.x), end = (chunk + 1) * kChunk,
            column = static_cast<int>(threadIdx.x) * 8;
  const std::int32_t* tokens = a.sorted.tokens;
  if (end >= a.sorted.count || tokens[end] != tokens[end - 1]) return;
  const std::int32_t token = tokens[end];
  const int first = chunk * kChunk;
  if (first > 0 && tokens[first - 1] == token) return;  // the run began earlier
  auto part = [&](int c, int slot) { return a.partial + (std::int64_t{c} * 2 + slot) * a.width + column; };
  Float8 sum;
#pragma unroll
  for (int k = 0; k < 8; ++k) sum.v[k] = part(chunk, 1)[k];
  const int chunks = (a.sorted.count + kChunk - 1) / kChunk;
#pragma unroll 4
  for (int c = chunk + 1; c < chunks && tokens[c * kChunk] == token; ++c)
#pragma unroll
    for (int k = 0; k < 8; ++k) sum.v[k] += part(c, 0)[k];
  float* out = a.dw + std::int64_t{token} * a.width + column;
#pragma unroll
  for (int k = 0; k < 8; ++k) out[k] += sum.v[k];
}

/// Where the scratch of one gradient lies in its workspace.
struct Scratch {
  std::int64_t count, width;
  std::size_t array() const { return aligned(static_cast<std::size_t>(count) * sizeof(std::int32_t)); }
  std::size_t partial() const {
    const auto chunks = static_cast<std::size_t>((count + kChunk - 1) / kChunk);
    return chunks * 2 * static_cast<std::size_t>(width) * sizeof(float);
  }
  /// More than the sort asks for: it wants two arrays and histograms.
  std::size_t sort() const { return 4 * array() + (std::size_t{1} << 20); }
  std::size_t bytes() const { return 3 * array() + partial() + sort(); }
};

Scratch scratch_of(std::span<const TensorSpec> in) { return {.count = in[0].shape.numel(), .width = in[1].shape[1]}; }

std::size_t gradient_workspace(const Nodes& nodes) { return scratch_of(nodes.inputs()).bytes(); }

void check_width(const Nodes& nodes) {
  const TensorSpec spec = nodes.inputs()[1];
  require(spec.dtype == DType::bf16 && spec.shape[1] % 8 == 0 && spec.shape[1] <= 8192,
          "embedding: {} {}, expected bf16 and a width in eights, at most 8192", to_string(spec.dtype),
          spec.shape.str());
}

std::unique_ptr<Kernel> make_forward(const Nodes&, Context& context) {
  return simple_kernel([stream = context.stream](const KernelArgs& args) {
    const std::int64_t vectors = args.out[0].numel() / 8;
    launch({"embedding", blocks_for(vectors, kThreads), kThreads, stream}, gather, args.in[0].as<std::int32_t>(),
           static_cast<const bf16*>(args.in[1].data), static_cast<bf16*>(args.out[0].data), vectors,
           static_cast<int>(args.out[0].shape()[1] / 8));
  });
}

std::unique_ptr<Kernel> make_gradient(const Nodes& nodes, Context& context) {
  const Scratch scratch = scratch_of(nodes.inputs());
  const bool add = nodes.node().out.empty();
  return simple_kernel([scratch, add, stream = context.stream](const KernelArgs& args) {
    const Tensor dw = add ? args.in[2] : args.out[0];
    auto* base = static_cast<std::byte*>(args.workspace.data);
    auto array = [&](int i) {
      return reinterpret_cast<std::int32_t*>(base + static_cast<std::size_t>(i) * scratch.array());
    };
    const int count = static_cast<int>(scratch.count);
    if (!add && !args.accumulate) check_cuda(cudaMemsetAsync(dw.data, 0, dw.bytes(), stream), "cudaMemsetAsync");
    launch({"embedding_dw", blocks_for(count, kThreads), kThreads, stream}, number, array(0), count);
    int bits = 1;
    while ((std::int64_t{1} << bits) < dw.shape()[0]) ++bits;
    std::size_t sort_bytes = scratch.sort();
    check_cuda(cub::DeviceRadixSort::SortPairs(base + 3 * scratch.array() + scratch.partial(), sort_bytes,
                                               args.in[0].as<std::int32_t>(), array(1), array(0), array(2), count, 0,
                                               bits, stream),
               "cub::DeviceRadixSort");
    const SumArgs a{.sorted = {array(1), array(2), count},
                    .dy = static_cast<const bf16*>(args.in[1].data),
                    .dw = dw.as<float>(),
                    .partial = reinterpret_cast<float*>(base + 3 * scratch.array()),
                    .width = static_cast<int>(scratch.width)};
    const unsigned chunks = blocks_for(count, kChunk), threads = static_cast<unsigned>(scratch.width / 8);
    launch({"embedding_dw", chunks, threads, stream}, sum_chunks, a);
    launch({"embedding_dw", chunks, threads, stream}, join_runs, a);
  });
}

}  // namespace

OpEntry embedding_entry() { return {.name = "embedding", .make = make_forward, .check = check_width}; }
OpEntry embedding_gradient_entry() {
  return {.name = "embedding_dw", .workspace_bytes = gradient_workspace, .make = make_gradient, .check = check_width};
}

}  // namespace kiln::cuda

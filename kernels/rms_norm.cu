#include "kernels/rms_norm.h"

#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"
#include "ops/rms_norm.h"

namespace kiln::cuda {
namespace {

constexpr int kWarps = 8;  // rows in flight of a block
constexpr int kScaleThreads = 256;
constexpr int kMaxVectors = 32;       // of eight elements a lane: C <= 8192
constexpr std::int64_t kParts = 528;  // partial sums of dw; fixed, so that the order of the sum is

/// Vectors of eight that one lane holds of a row in the forward pass; warps that share a row in the backward pass.
int vectors_of(std::int64_t width) { return static_cast<int>((width + 255) / 256); }

/// A warp a row, kept in registers between the sum of squares and the scaling: every element is read once.
template <int kVectors, bool kResidual>
__global__ void __launch_bounds__(kWarps * 32) forward(NormForward a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = ordered_block(a.order) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const std::int64_t base = row * a.width;
  Bf16x8 r[kVectors];
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = (v * 32 + lane) * 8;
    if (c >= a.width) continue;
    r[v] = load8(a.x + base + c);
    if constexpr (kResidual) {
      Float8 total = unpack(r[v]);
      const Float8 delta = unpack(load8_streaming(a.delta + base + c));
#pragma unroll
      for (int i = 0; i < 8; ++i) total.v[i] += delta.v[i];
      r[v] = pack(total);
      store8_streaming(a.sum + base + c, r[v]);
    }
    const Float8 values = unpack(r[v]);  // of what backward will read
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += values.v[i] * values.v[i];
  }
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(a.width) + a.eps);
  if (lane == 0) a.rstd[row] = scale;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int c = (v * 32 + lane) * 8;
    if (c >= a.width) continue;
    Float8 y = unpack(r[v]);
    const Float8 w = unpack(load8(a.w + c));
#pragma unroll
    for (int i = 0; i < 8; ++i) y.v[i] *= scale * w.v[i];
    store8(a.y + base + c, pack(y));
  }
}

/// y = r rstd w as forward() rounds it: eight elements a thread.
__global__ void __launch_bounds__(kScaleThreads) scale_rows(const bf16* r, const bf16* w, const float* rstd, bf16* y,
                                                            std::int64_t vectors, int per_row, RowOrder order) {
  const std::int64_t i = ordered_block(order) * kScaleThreads + threadIdx.x;
  if (i >= vectors) return;
  const std::int64_t row = i / per_row;
  Float8 out = unpack(load8(r + i * 8));
  const Float8 weight = unpack(load8(w + (i - row * per_row) * 8));
  const float scale = rstd[row];
#pragma unroll
  for (int k = 0; k < 8; ++k) out.v[k] *= scale * weight.v[k];
  store8(y + i * 8, pack(out));
}

struct BackwardArgs {
  const bf16 *r, *w, *dy, *arriving;
  const float* rstd;
  bf16* dx;
  float* partial;  // [parts, width]
  std::int64_t rows, rows_per_part;
  int width;
  RowOrder order;
};

/// What a thread holds of one row: eight columns.
struct Row {
  Bf16x8 r, dy, arriving;
  float rstd;
};

/// With z = r rstd and g = dy w: dr = rstd (g - z mean(g z)), dw = sum_N dy z. A row is shared by `kSpan` warps, eight
/// columns a thread, so that few registers are held and loads of the next row are under way while this one is summed. A
/// block owns consecutive rows and takes kWarps / kSpan of them at a time; each thread sums dw of its columns, then the
/// rows' groups are added in order.
template <int kSpan>
__global__ void __launch_bounds__((kSpan > kWarps ? kSpan : kWarps / kSpan * kSpan) * 32) backward(BackwardArgs a) {
  constexpr int kSlots = kSpan > kWarps ? 1 : kWarps / kSpan;
  extern __shared__ float shared[];  // [width]
  __shared__ float dots[2][kSlots][kSpan];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int slot = warp / kSpan, part = warp % kSpan, column = (part * 32 + lane) * 8;
  const bool active = column < a.width;  // the same for all of a row's slots
  const std::int64_t block = ordered_block(a.order), first = block * a.rows_per_part;
  const std::int64_t last = min(first + a.rows_per_part, a.rows);
  auto load = [&](std::int64_t row) {
    Row x{};
    if (!active) return x;
    const std::int64_t at = row * a.width + column;
    x.r = load8_streaming(a.r + at);
    x.dy = load8_streaming(a.dy + at);
    if (a.arriving != nullptr) x.arriving = load8_streaming(a.arriving + at);
    x.rstd = a.rstd[row];
    return x;
  };
  const Float8 w = active ? unpack(load8(a.w + column)) : Float8{};
  Float8 dw{};
  int parity = 0;
  Row next = first + slot < last ? load(first + slot) : Row{};
  for (std::int64_t row = first + slot; row < last; row += kSlots, parity ^= 1) {
    const Row now = next;
    if (row + kSlots < last) next = load(row + kSlots);
    const Float8 r = unpack(now.r), d = unpack(now.dy);
    float dot = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      dw.v[i] += d.v[i] * r.v[i] * now.rstd;
      dot += d.v[i] * w.v[i] * r.v[i];
    }
    dot = warp_sum(dot);
    if constexpr (kSpan > 1) {
      if (lane == 0) dots[parity][slot][part] = dot;
      wait_for_slot<kSlots>(slot, kSpan * 32);
      dot = 0;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) dot += dots[parity][slot][i];
    }
    if (!active) continue;
    const float scale = now.rstd;
    const float mean = dot * scale * scale * scale / static_cast<float>(a.width);
    Float8 out = unpack(now.arriving);
#pragma unroll
    for (int i = 0; i < 8; ++i) out.v[i] += d.v[i] * w.v[i] * scale - r.v[i] * mean;
    store8(a.dx + row * a.width + column, pack(out));
  }
  // Slots without a row in the last turn meet once more all the same, so that every warp has passed as many barriers:
  // otherwise compute-sanitizer's racecheck takes the turns below for races.
  if constexpr (kSpan > 1) {
    const std::int64_t rest = (last - first) % kSlots;
    if (rest != 0 && slot >= rest) wait_for_slot<kSlots>(slot, kSpan * 32);
  }
  for (int turn = 0; turn < kSlots; ++turn) {
    if (slot == turn && active)
#pragma unroll
      for (int i = 0; i < 8; ++i) shared[column + i] = (turn == 0 ? 0.0f : shared[column + i]) + dw.v[i];
    __syncthreads();
  }
  for (int c = static_cast<int>(threadIdx.x); c < a.width; c += static_cast<int>(blockDim.x))
    a.partial[block * a.width + c] = shared[c];
}

/// dw[c] (+)= sum of the parts, in order: 32 columns a block, 32 groups of parts, then the groups in order.
__global__ void __launch_bounds__(1024)
    sum_parts(const float* partial, int parts, int width, bool accumulate, float* dw) {
  __shared__ float sums[32][33];
  const int column = static_cast<int>(blockIdx.x) * 32 + static_cast<int>(threadIdx.x);
  float total = 0;
  if (column < width)
    for (int p = static_cast<int>(threadIdx.y); p < parts; p += 32) total += partial[std::int64_t{p} * width + column];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  total = accumulate ? dw[column] : 0.0f;
  for (int group = 0; group < 32; ++group) total += sums[group][threadIdx.x];
  dw[column] = total;
}

/// Calls f with the row length as a constant number of vectors.
template <typename F>
void with_vectors(std::int64_t width, F&& f) {
  switch (vectors_of(width)) {
#define KILN_CASE(n) \
  case n:            \
    return f(std::integral_constant<int, n>{})
    KILN_CASE(1);
    KILN_CASE(2);
    KILN_CASE(3);
    KILN_CASE(4);
    KILN_CASE(5);
    KILN_CASE(6);
    KILN_CASE(7);
    KILN_CASE(8);
#undef KILN_CASE
    default:
      if (vectors_of(width) <= 16) return f(std::integral_constant<int, 16>{});
      return f(std::integral_constant<int, kMaxVectors>{});
  }
}

void check_width(const Nodes& nodes) { check_norm_width(nodes.inputs()[0]); }

std::unique_ptr<Kernel> make_forward(const Nodes& nodes, Context& context) {
  const RmsNorm::Options options = nodes.op<RmsNorm>().options();
  return simple_kernel([options, order = context.turn(), stream = context.stream](const KernelArgs& args) {
    const Tensor& x = args.in[0];
    norm_forward({.x = static_cast<const bf16*>(x.data),
                  .w = static_cast<const bf16*>(args.in[1].data),
                  .delta = options.residual ? static_cast<const bf16*>(args.in[2].data) : nullptr,
                  .y = static_cast<bf16*>(args.out[0].data),
                  .sum = options.residual ? static_cast<bf16*>(args.out[2].data) : nullptr,
                  .rstd = args.out[1].as<float>(),
                  .rows = x.shape()[0],
                  .width = static_cast<int>(x.shape()[1]),
                  .eps = static_cast<float>(options.eps),
                  .order = order},
                 stream);
  });
}

std::unique_ptr<Kernel> make_scale(const Nodes&, Context& context) {
  return simple_kernel([order = context.turn(), stream = context.stream](const KernelArgs& args) {
    const std::int64_t vectors = args.in[0].numel() / 8;
    launch({"rms_scale", blocks_for(vectors, kScaleThreads), kScaleThreads, stream}, scale_rows,
           static_cast<const bf16*>(args.in[0].data), static_cast<const bf16*>(args.in[1].data),
           static_cast<const float*>(args.in[2].data), static_cast<bf16*>(args.out[0].data), vectors,
           static_cast<int>(args.in[0].shape()[1] / 8), order);
  });
}

std::size_t backward_workspace(const Nodes& nodes) {
  return static_cast<std::size_t>(kParts * nodes.inputs()[0].shape[1]) * sizeof(float);
}

std::unique_ptr<Kernel> make_backward(const Nodes&, Context& context) {
  return simple_kernel([order = context.turn(), stream = context.stream](const KernelArgs& args) {
    const std::int64_t rows = args.in[0].shape()[0], width = args.in[0].shape()[1];
    const std::int64_t rows_per_part = std::max<std::int64_t>(kWarps, (rows + kParts - 1) / kParts);
    const auto parts = blocks_for(rows, rows_per_part);
    const BackwardArgs a{.r = static_cast<const bf16*>(args.in[0].data),
                         .w = static_cast<const bf16*>(args.in[1].data),
                         .dy = static_cast<const bf16*>(args.in[3].data),
                         .arriving = args.in.size() == 5 ? static_cast<const bf16*>(args.in[4].data) : nullptr,
                         .rstd = args.in[2].as<float>(),
                         .dx = static_cast<bf16*>(args.out[0].data),
                         .partial = static_cast<float*>(args.workspace.data),
                         .rows = rows,
                         .rows_per_part = rows_per_part,
                         .width = static_cast<int>(width),
                         .order = order};
    with_vectors(width, [&](auto vectors) {
      constexpr int kSpan = vectors();
      constexpr unsigned kThreads = (kSpan > kWarps ? kSpan : kWarps / kSpan * kSpan) * 32;
      launch({"rms_norm_dx", parts, kThreads, stream, static_cast<std::size_t>(width) * sizeof(float)}, backward<kSpan>,
             a);
    });
    launch({"rms_norm_dw", blocks_for(width, 32), dim3(32, 32), stream}, sum_parts, a.partial, static_cast<int>(parts),
           static_cast<int>(width), args.accumulate, args.out[1].as<float>());
  });
}

}  // namespace

void check_norm_width(const TensorSpec& x) {
  const std::int64_t width = x.shape[1];
  require(x.dtype == DType::bf16 && width % 8 == 0 && vectors_of(width) <= kMaxVectors,
          "rms_norm: x {} {}, expected bf16 and a width that is a multiple of 8, at most {}", to_string(x.dtype),
          x.shape.str(), 256 * kMaxVectors);
}

void norm_forward(const NormForward& args, cudaStream_t stream) {
  const Launch how{"rms_norm", blocks_for(args.rows, kWarps), kWarps * 32, stream};
  with_vectors(args.width, [&](auto vectors) {
    launch(how, args.delta != nullptr ? forward<vectors(), true> : forward<vectors(), false>, args);
  });
}

OpEntry rms_norm_entry() { return {.name = "rms_norm", .make = make_forward, .check = check_width}; }
OpEntry add_rms_norm_entry() { return {.name = "add_rms_norm", .make = make_forward, .check = check_width}; }
OpEntry rms_scale_entry() { return {.name = "rms_scale", .make = make_scale, .check = check_width}; }
OpEntry rms_norm_gradient_entry() {
  return {.name = "rms_norm_dx", .workspace_bytes = backward_workspace, .make = make_backward, .check = check_width};
}

}  // namespace kiln::cuda

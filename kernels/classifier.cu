#include "ops/classifier.h"

#include <algorithm>

#include "graph/parameter.h"
#include "kernels/aligned.h"
#include "kernels/context.h"
#include "kernels/gemm_hopper.h"
#include "kernels/launch.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 512, kWarps = 8;

/// Where the scratch of one chunk lies in the workspace.
struct Scratch {
  std::int64_t rows, width, vocab;
  std::size_t logits() const { return bytes_of(rows * vocab * 2); }
  std::size_t scaled() const { return bytes_of(rows * width * 2); }
  std::size_t parts() const { return bytes_of(rows * gemm_logits_parts(static_cast<int>(vocab)) * 4); }
  std::size_t row() const { return bytes_of(rows * 4); }
  std::size_t bytes() const { return GemmPlans::kWorkspaceBytes + logits() + scaled() + parts() + 3 * row(); }
  static std::size_t bytes_of(std::int64_t bytes) { return aligned(static_cast<std::size_t>(bytes)); }
};

/// Tokens whose logits live at once: their memory stays near half a gigabyte, which keeps the traffic of the weight
/// gradient, read and written once a chunk, small against that of the logits.
std::int64_t chunk_tokens(std::int64_t tokens, std::int64_t vocab) {
  constexpr std::int64_t kLogits = std::int64_t{1} << 28;
  const std::int64_t most = std::max<std::int64_t>(256, kLogits / vocab / 256 * 256);
  const std::int64_t chunks = (tokens + most - 1) / most;
  return std::min(tokens, ((tokens + chunks - 1) / chunks + 127) / 128 * 128);
}

Scratch scratch_of(std::span<const TensorSpec> in) {
  return {.rows = chunk_tokens(in[0].shape[0], in[1].shape[0]), .width = in[0].shape[1], .vocab = in[1].shape[0]};
}

std::size_t workspace(const Nodes& nodes) { return scratch_of(nodes.inputs()).bytes(); }

// With shift_i the logit of row i's target, e = exp(logit - shift) and s its sum: the loss is log s, and since s >= 1
// nothing underflows. dlogits = f (e - s onehot) with f = scale / s: the GEMM leaves e, the target's e is corrected in
// place, and f scales the narrow x and dx instead of the wide rows.

struct RowArgs {
  const bf16 *x, *w;
  const std::int32_t* targets;
  float *shift, *target_logits;
  std::int64_t rows;
  int width, vocab;  // true classes
};

/// shift[i] = x_i . w_target, a warp a row; an ignored row takes the first class.
__global__ void __launch_bounds__(kWarps * 32) target_shift(RowArgs a) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t target = a.targets[row];
  const bf16* w = a.w + std::int64_t{target >= 0 && target < a.vocab ? target : 0} * a.width;
  float sum = 0;
  for (int c = lane * 8; c < a.width; c += 256) {
    const Float8 x = unpack(load8(a.x + row * a.width + c)), y = unpack(load8(w + c));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.v[i] * y.v[i];
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  a.shift[row] = sum;
  a.target_logits[row] = sum;
}

struct FinishArgs {
  const float *partial, *shift, *target_logits;
  const std::int32_t* targets;
  const double* scalars;
  float *losses, *factor;
  bf16 *e, *scaled;  // with a gradient
  const bf16* x;
  std::int64_t rows;
  int parts, width, vocab, true_vocab;
};

/// A warp a row: adds the parts in order, leaves loss and factor, corrects the target's e and scales x.
__global__ void __launch_bounds__(kWarps * 32) finish_rows(FinishArgs a) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
  for (int p = lane; p < a.parts; p += 32) sum += a.partial[std::int64_t{p} * a.rows + row];
  sum = warp_sum(sum);
  const std::int32_t target = a.targets[row];
  const bool counts = target >= 0 && target < a.true_vocab;
  const float scale = static_cast<float>(a.scalars[static_cast<int>(Scalar::loss_scale)]);
  const float factor = counts ? scale / sum : 0.0f;
  if (lane == 0) {
    a.losses[row] = counts ? logf(sum) + a.shift[row] - a.target_logits[row] : 0.0f;
    a.factor[row] = factor;
    if (counts && a.e != nullptr) {
      bf16& e = a.e[row * a.vocab + target];
      e = __float2bfloat16(__bfloat162float(e) - sum);
    }
  }
  if (a.e == nullptr) return;
  for (int c = lane * 8; c < a.width; c += 256) {
    Float8 x = unpack(load8(a.x + row * a.width + c));
#pragma unroll
    for (int i = 0; i < 8; ++i) x.v[i] *= factor;
    store8(a.scaled + row * a.width + c, pack(x));
  }
}

/// dx *= factor by row.
__global__ void __launch_bounds__(kThreads)
    scale_rows(bf16* dx, const float* factor, std::int64_t vectors, int per_row) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= vectors) return;
  Float8 x = unpack(load8(dx + i * 8));
  const float f = factor[i / per_row];
#pragma unroll
  for (int k = 0; k < 8; ++k) x.v[k] *= f;
  store8(dx + i * 8, pack(x));
}

class ClassifierKernel final : public Kernel {
 public:
  ClassifierKernel(const Nodes& nodes, Context& context)
      : context_(context), options_(nodes.op<Classifier>().options()), scratch_(scratch_of(nodes.inputs())) {
    context.ascend();
  }

  void run(std::span<const KernelArgs> nodes) override {
    const KernelArgs& args = nodes.front();
    const std::int64_t rows = args.in[0].shape()[0];
    for (std::int64_t first = 0; first < rows; first += scratch_.rows)
      run_chunk(args, first, std::min(scratch_.rows, rows - first));
  }

 private:
  void run_chunk(const KernelArgs& args, std::int64_t first, std::int64_t rows) {
    auto* at = static_cast<std::byte*>(args.workspace.data);
    auto take = [&at](std::size_t bytes) { return std::exchange(at, at + bytes); };
    void* gemm_workspace = take(GemmPlans::kWorkspaceBytes);
    auto* logits = reinterpret_cast<bf16*>(take(scratch_.logits()));
    auto* scaled = reinterpret_cast<bf16*>(take(scratch_.scaled()));
    auto* partial = reinterpret_cast<float*>(take(scratch_.parts()));
    auto* shift = reinterpret_cast<float*>(take(scratch_.row()));
    auto* target_logits = reinterpret_cast<float*>(take(scratch_.row()));
    auto* factor = reinterpret_cast<float*>(take(scratch_.row()));
    const int width = static_cast<int>(scratch_.width), vocab = static_cast<int>(scratch_.vocab);
    const int true_vocab = options_.valid_vocab > 0 ? static_cast<int>(options_.valid_vocab) : vocab;
    const auto* x = static_cast<const bf16*>(args.in[0].data) + first * width;
    const auto* w = static_cast<const bf16*>(args.in[1].data);
    const std::int32_t* targets = args.in[2].as<std::int32_t>() + first;
    const bool gradient = options_.gradient;

    launch({"classifier shift", blocks_for(rows, kWarps), kWarps * 32, context_.stream}, target_shift,
           RowArgs{x, w, targets, shift, target_logits, rows, width, true_vocab});
    const int parts = gemm_logits_parts(vocab);
    gemm_logits_exp({.x = x,
                     .w = w,
                     .shift = shift,
                     .targets = targets,
                     .e = gradient ? logits : nullptr,
                     .partial_sums = partial,
                     .target_logits = target_logits,
                     .m = static_cast<int>(rows),
                     .c = width,
                     .v = vocab,
                     .v_true = true_vocab,
                     .order = RowOrder::descending},  // the GEMMs behind it ascend
                    context_.stream);
    launch({"classifier rows", blocks_for(rows, kWarps), kWarps * 32, context_.stream}, finish_rows,
           FinishArgs{partial, shift, target_logits, targets, args.in[3].as<double>(), args.out[0].as<float>() + first,
                      factor, gradient ? logits : nullptr, scaled, x, rows, parts, width, vocab, true_vocab});
    if (!gradient) return;

    auto* dx = static_cast<bf16*>(args.out[1].data) + first * width;
    context_.gemms->run(
        {.m = rows, .n = width, .k = vocab, .a = logits, .lda = vocab, .b = w, .ldb = width, .c = dx, .ldc = width},
        gemm_workspace);
    const std::int64_t vectors = rows * width / 8;
    launch({"classifier dx", blocks_for(vectors, kThreads), kThreads, context_.stream}, scale_rows, dx, factor, vectors,
           width / 8);
    context_.gemms->run({.trans_a = Trans::yes,
                         .m = vocab,
                         .n = width,
                         .k = rows,
                         .a = logits,
                         .lda = vocab,
                         .b = scaled,
                         .ldb = width,
                         .c = args.out[2].data,
                         .ldc = width,
                         .c_type = DType::f32,
                         .accumulate = args.accumulate || first > 0},
                        gemm_workspace);
  }

  Context& context_;
  Classifier::Options options_;
  Scratch scratch_;
};

std::unique_ptr<Kernel> make_classifier(const Nodes& nodes, Context& context) {
  return std::make_unique<ClassifierKernel>(nodes, context);
}

void check_classifier(const Nodes& nodes) {
  const std::vector<TensorSpec> in = nodes.inputs();
  require(in[0].dtype == DType::bf16 && in[0].shape[1] % 8 == 0 && in[1].shape[0] % 8 == 0,
          "classifier: x {} {} and w {}, expected bf16 and sizes in eights", to_string(in[0].dtype), in[0].shape.str(),
          in[1].shape.str());
}

OpEntry entry(std::string_view name) {
  return {.name = name, .workspace_bytes = workspace, .make = make_classifier, .check = check_classifier};
}

}  // namespace

OpEntry classifier_entry() { return entry("classifier"); }
OpEntry classifier_with_gradient_entry() { return entry("classifier_with_gradient"); }

}  // namespace kiln::cuda

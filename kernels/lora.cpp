#include "kernels/lora.h"

#include "optim/lora.h"

#include "base/rng.h"
#include "kernels/aligned.h"
#include "kernels/low_rank_group.h"

namespace kiln::cuda {
namespace {

std::size_t bytes_of(std::int64_t elements, std::size_t size) {
  return aligned(static_cast<std::size_t>(elements) * size);
}

/// What a matrix needs beside its states: the change of W takes the place of G in bf16.
struct Sizes {
  std::size_t left, right, db, da, product, thresholds = 256;

  Sizes(const LowRankGeometry& at)
      : left(bytes_of(std::int64_t{2} * at.m * at.rank, 2)),
        right(bytes_of(std::int64_t{2} * at.rank * at.n, 2)),
        db(bytes_of(std::int64_t{1} * at.m * at.rank, sizeof(float))),
        da(bytes_of(std::int64_t{1} * at.rank * at.n, sizeof(float))),
        product(bytes_of(std::int64_t{1} * at.m * at.n, sizeof(float))) {}
  std::size_t bytes() const { return left + right + db + da + product + thresholds + GemmPlans::kWorkspaceBytes; }
};

LowRankGeometry geometry(const LoraUpdate& op) { return low_rank_geometry(op.parameter(), op.options().rank); }

std::size_t workspace(const Nodes& nodes) { return Sizes(geometry(nodes.op<LoraUpdate>())).bytes(); }

/// So many of the smallest of [rows, columns] second moments go, counted without padding, where they are zero.
std::int64_t pruned(std::int64_t stored, std::int64_t own) {
  return stored - own + static_cast<std::int64_t>(kLoraPruned * static_cast<double>(own));
}

/// One matrix, as optim/lora.cpp has it: dB and dA, Adam, and what the product of A and B changed.
class LoraKernel final : public Kernel {
 public:
  LoraKernel(const Nodes& nodes, Context& context)
      : op_(&nodes.op<LoraUpdate>()),
        gemms_(context.gemms),
        stream_(context.stream),
        code_maps_(make_code_maps(context, op_->options().states == StatePrecision::int8)) {}

  void bind(std::span<const KernelArgs> nodes) override {
    const LowRankGeometry at = geometry(*op_);
    const Sizes sizes(at);
    const UpdateArgs args = op_->arguments(nodes.front());
    t_ = matrix(*op_, args);
    t_.stream_of_work = stream_;
    t_.maps = reinterpret_cast<const CodeMaps*>(code_maps_.data());
    auto* memory = static_cast<std::byte*>(args.workspace.data);
    auto cut = [&]<typename T>(T*& to, std::size_t bytes) {
      to = reinterpret_cast<T*>(memory);
      memory += bytes;
    };
    cut(t_.left, sizes.left);
    cut(t_.right, sizes.right);
    cut(t_.db, sizes.db);
    cut(t_.da, sizes.da);
    cut(t_.product, sizes.product);
    cut(t_.thresholds, sizes.thresholds);
    t_.half = reinterpret_cast<std::uint16_t*>(t_.product);
    gemm_memory_ = memory;
  }

  void run(std::span<const KernelArgs>) override {
    const std::int64_t m = t_.m, n = t_.n, r = t_.r;
    const void* g = t_.half_gradient ? t_.g : t_.half;
    auto run = [&](Gemm gemm) {
      gemm.c_type = DType::f32;
      gemms_->run(gemm, gemm_memory_);
    };
    if (t_.restart) lora_thresholds(t_);
    lora_begin(t_);
    run({.trans_b = Trans::yes,
         .m = m,
         .n = r,
         .k = n,
         .a = g,
         .lda = n,
         .b = t_.right,
         .ldb = n,
         .c = t_.db,
         .ldc = r});
    run({.trans_a = Trans::yes,
         .m = r,
         .n = n,
         .k = m,
         .a = t_.left,
         .lda = 2 * r,
         .b = g,
         .ldb = n,
         .c = t_.da,
         .ldc = n});
    lora_adam(t_);
    // B dA + dB A_new in one product.
    run({.m = m, .n = n, .k = 2 * r, .a = t_.left, .lda = 2 * r, .b = t_.right, .ldb = n, .c = t_.product, .ldc = n});
    lora_merge(t_);
  }

 private:
  static LoraMatrix matrix(const LoraUpdate& op, const UpdateArgs& args) {
    const LoraUpdate::Options& o = op.options();
    const Parameter& parameter = op.parameter();
    const LowRankGeometry at = geometry(op);
    const Shape& own = parameter.own_shape();
    LoraMatrix t{};
    t.w = static_cast<std::uint16_t*>(args.w.data);
    t.low = static_cast<std::uint16_t*>(args.low.data);
    t.g = args.g.data;
    t.a = args.states[0].as<float>();
    t.b = args.states[1].as<float>();
    t.m = at.m;
    t.n = at.n;
    t.r = at.rank;
    t.own_n = static_cast<std::int32_t>(own[1]);
    t.states = o.states;
    std::span<const Tensor> states = args.states.subspan(2);
    for (std::size_t factor = 0; factor < 2; ++factor) {
      t.pruned[factor] = factor == 0 ? pruned(std::int64_t{at.rank} * at.n, at.rank * own[1])
                                     : pruned(std::int64_t{at.rank} * at.m, at.rank * own[0]);
      for (std::size_t moment = 0; moment < 2; ++moment)
        t.moments[factor][moment] = take_state(
            states, parameter, fmt::format("lora_{}_exp_avg{}", factor == 0 ? 'a' : 'b', moment == 0 ? "" : "_sq"));
    }
    t.stream = stream_of(parameter.name.c_str());
    t.half_gradient = args.g.dtype() == DType::bf16;
    t.decay = parameter.decay;
    t.restart = o.restart;
    t.every = static_cast<std::int32_t>(o.refresh);
    t.offset = static_cast<std::int32_t>(op.schedule().offset);
    t.rewarm = static_cast<std::int32_t>(o.rewarm);
    t.beta1 = o.beta1;
    t.beta2 = o.beta2;
    t.eps = o.eps;
    t.weight_decay = o.weight_decay;
    t.scale = o.alpha / static_cast<double>(at.rank);
    t.seed = o.seed;
    t.scalars = args.scalars.as<double>();
    return t;
  }

  const LoraUpdate* op_;
  GemmPlans* gemms_;
  cudaStream_t stream_;
  LoraMatrix t_{};
  std::byte* gemm_memory_ = nullptr;
  Buffer code_maps_;
};

std::unique_ptr<Kernel> make_lora(const Nodes& nodes, Context& context) {
  return std::make_unique<LoraKernel>(nodes, context);
}

void check_lora(const Nodes& nodes) { require_low_rank(nodes, nodes.op<LoraUpdate>().options().rank); }

}  // namespace

OpEntry lora_entry() {
  return {.name = "lora_update", .workspace_bytes = workspace, .make = make_lora, .check = check_lora};
}

}  // namespace kiln::cuda

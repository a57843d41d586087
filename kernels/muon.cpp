#include "kernels/muon.h"

#include "optim/muon.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/rng.h"
#include "kernels/aligned.h"
#include "kernels/launch.cuh"
#include "kernels/low_rank_group.h"

namespace kiln::cuda {
namespace {

constexpr std::size_t kBatchBytes = std::size_t{64} << 20;  // of the iteration's operands, where more than one fits

/// Elements from one matrix of bf16 to the next.
std::int64_t stride_of(std::int64_t elements) {
  return static_cast<std::int64_t>(aligned(static_cast<std::size_t>(2 * elements)) / 2);
}

/// Matrices of one shape whose products are batched: [first, first + count) in the layout's order.
struct Batch {
  int first, count;
  std::int64_t m, n;
  std::int64_t side() const { return std::min(m, n); }
  std::int64_t stride() const { return stride_of(m * n); }
  std::int64_t gram_stride() const { return stride_of(side() * side()); }
  /// Two of X and two of its Gram matrix, in bf16.
  std::size_t bytes() const { return 4 * static_cast<std::size_t>(count * (stride() + gram_stride())); }
};

/// How a group's matrices are ordered, batched and given workspace.
struct Layout {
  std::vector<std::size_t> order;  // nodes, those of one shape together
  std::vector<Batch> batches;
  std::vector<int> first_piece;  // of each matrix in order, and the end
  std::size_t batch_bytes = 0;   // of the largest batch

  explicit Layout(const Nodes& nodes) : order(nodes.group.count), first_piece{0} {
    auto shape = [&](std::size_t i) { return nodes.op<MuonUpdate>(i).parameter().shape; };
    auto sizes = [&](std::size_t i) { return std::pair(shape(i)[0], shape(i)[1]); };
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order, {}, sizes);
    for (std::size_t i = 0; i < order.size(); ++i) {
      Batch alone{static_cast<int>(i), 1, shape(order[i])[0], shape(order[i])[1]};
      const bool joins = !batches.empty() && batches.back().m == alone.m && batches.back().n == alone.n &&
                         batches.back().bytes() + alone.bytes() <= kBatchBytes;
      joins ? void(++batches.back().count) : batches.push_back(alone);
      first_piece.push_back(first_piece.back() + static_cast<int>(blocks_for(alone.m * alone.n, kMuonPiece)));
    }
    for (const Batch& batch : batches) batch_bytes = std::max(batch_bytes, batch.bytes());
  }
  int pieces() const { return first_piece.back(); }
  std::size_t parts_bytes() const { return aligned(sizeof(double) * static_cast<std::size_t>(pieces())); }
  std::size_t inverse_bytes() const { return aligned(sizeof(float) * order.size()); }
  std::size_t bytes() const { return parts_bytes() + inverse_bytes() + batch_bytes + GemmPlans::kWorkspaceBytes; }
};

std::size_t workspace(const Nodes& nodes) { return Layout(nodes).bytes(); }

/// All neighbouring Muon updates of a plan: the norms of all, then batch by batch.
class MuonKernel final : public Kernel {
 public:
  MuonKernel(const Nodes& nodes, Context& context) : layout_(nodes), gemms_(context.gemms), stream_(context.stream) {
    for (const std::size_t i : layout_.order) ops_.push_back(&nodes.op<MuonUpdate>(i));
    half_gradient_ = nodes.inputs()[1].dtype == DType::bf16;
    code_maps_ = make_code_maps(context, ops_.front()->options().states == StatePrecision::int8);
    matrix_table_ = context.allocate(ops_.size() * sizeof(MuonMatrix), "table of Muon's updates");
    piece_table_ =
        context.allocate(static_cast<std::size_t>(layout_.pieces()) * sizeof(MuonPiece), "table of Muon's updates");
  }

  void bind(std::span<const KernelArgs> nodes) override {
    auto* memory = static_cast<std::byte*>(nodes.front().workspace.data);
    auto* parts = reinterpret_cast<double*>(memory);
    auto* inverse = reinterpret_cast<float*>(memory + layout_.parts_bytes());
    batch_memory_ = memory + layout_.parts_bytes() + layout_.inverse_bytes();
    gemm_memory_ = batch_memory_ + layout_.batch_bytes;
    std::vector<MuonMatrix> matrices;
    std::vector<MuonPiece> pieces;
    for (const Batch& batch : layout_.batches) {
      for (int k = 0; k < batch.count; ++k) {
        const int i = batch.first + k;
        const auto at = static_cast<std::size_t>(i);
        MuonMatrix t = matrix(*ops_[at], nodes[layout_.order[at]]);
        t.start = operand(batch, 0) + k * batch.stride();
        t.result = operand(batch, kNewtonSchulzSteps % 2) + k * batch.stride();
        t.inverse = inverse + i;
        t.parts = parts + layout_.first_piece[at];
        t.piece_count = layout_.first_piece[at + 1] - layout_.first_piece[at];
        for (int p = 0; p < t.piece_count; ++p) pieces.push_back({i, p});
        matrices.push_back(t);
      }
    }
    copy_to_device(matrix_table_, matrices.data(), stream_);
    copy_to_device(piece_table_, pieces.data(), stream_);
  }

  void run(std::span<const KernelArgs> nodes) override {
    const MuonUpdate::Options& o = ops_.front()->options();
    MuonTable table{.matrices = reinterpret_cast<const MuonMatrix*>(matrix_table_.data()),
                    .pieces = reinterpret_cast<const MuonPiece*>(piece_table_.data()),
                    .count = layout_.pieces(),
                    .half_gradient = half_gradient_,
                    .states = o.states,
                    .maps = reinterpret_cast<const CodeMaps*>(code_maps_.data()),
                    .scalars = nodes.front().in[2].as<double>(),
                    .momentum = o.momentum,
                    .weight_decay = o.weight_decay,
                    .seed = o.seed,
                    .stream = stream_};
    muon_norm(table, static_cast<int>(ops_.size()));
    const MuonPiece* pieces = table.pieces;
    for (const Batch& batch : layout_.batches) {
      const int first = layout_.first_piece[static_cast<std::size_t>(batch.first)];
      table.pieces = pieces + first;
      table.count = layout_.first_piece[static_cast<std::size_t>(batch.first + batch.count)] - first;
      muon_momentum(table);
      orthogonalise(batch);
      muon_apply(table);
    }
  }

 private:
  static MuonMatrix matrix(const MuonUpdate& op, const KernelArgs& node) {
    const UpdateArgs a = op.arguments(node);
    const Parameter& parameter = op.parameter();
    MuonMatrix t{};
    t.w = static_cast<std::uint16_t*>(a.w.data);
    t.low = static_cast<std::uint16_t*>(a.low.data);
    t.g = a.g.data;
    std::span<const Tensor> states = a.states;
    t.momentum = take_state(states, parameter, "momentum");
    t.stream = stream_of(parameter.name.c_str());
    t.n = a.w.numel();
    t.scale = op.scale();
    t.decay = parameter.decay;
    return t;
  }

  /// X of a batch before the steps of even (0) and odd (1) number.
  std::uint16_t* operand(const Batch& batch, int parity) const {
    return reinterpret_cast<std::uint16_t*>(batch_memory_) + parity * batch.count * batch.stride();
  }

  /// X <- a X + (b A + c A A) X with A = X X'; where W is tall, X stays as it lies and the factors stand on its right.
  void orthogonalise(const Batch& batch) const {
    const std::int64_t side = batch.side(), n = batch.n, stride = batch.stride(), gram_stride = batch.gram_stride();
    const bool tall = batch.m > batch.n;
    std::uint16_t *gram = operand(batch, 2), *square = gram + batch.count * gram_stride;
    auto run = [&](Gemm gemm) {
      gemm.batch = batch.count;
      gemms_->run(gemm, gemm_memory_);
    };
    for (int step = 0; step < kNewtonSchulzSteps; ++step) {
      const std::uint16_t* x = operand(batch, step % 2);
      run({.trans_a = tall ? Trans::yes : Trans::no,
           .trans_b = tall ? Trans::no : Trans::yes,
           .m = side,
           .n = side,
           .k = std::max(batch.m, batch.n),
           .a = x,
           .lda = n,
           .b = x,
           .ldb = n,
           .c = gram,
           .ldc = side,
           .stride_a = stride,
           .stride_b = stride,
           .stride_c = gram_stride});
      run({.m = side,
           .n = side,
           .k = side,
           .a = gram,
           .lda = side,
           .b = gram,
           .ldb = side,
           .c = square,
           .ldc = side,
           .add = gram,
           .alpha = static_cast<float>(kNewtonSchulz[2]),
           .beta = static_cast<float>(kNewtonSchulz[1]),
           .stride_a = gram_stride,
           .stride_b = gram_stride,
           .stride_c = gram_stride});
      run({.m = batch.m,
           .n = n,
           .k = side,
           .a = tall ? x : square,
           .lda = side,
           .b = tall ? square : x,
           .ldb = n,
           .c = operand(batch, (step + 1) % 2),
           .ldc = n,
           .add = x,
           .beta = static_cast<float>(kNewtonSchulz[0]),
           .stride_a = tall ? stride : gram_stride,
           .stride_b = tall ? gram_stride : stride,
           .stride_c = stride});
    }
  }

  Layout layout_;
  GemmPlans* gemms_;
  cudaStream_t stream_;
  bool half_gradient_ = false;
  std::vector<const MuonUpdate*> ops_;  // in the layout's order
  std::byte *batch_memory_ = nullptr, *gemm_memory_ = nullptr;
  Buffer matrix_table_, piece_table_, code_maps_;
};

std::unique_ptr<Kernel> make_muon(const Nodes& nodes, Context& context) {
  return std::make_unique<MuonKernel>(nodes, context);
}

void check_muon(const Nodes& nodes) { require_matrices(nodes); }

}  // namespace

OpEntry muon_entry() {
  return {
      .name = "muon_update", .workspace_bytes = workspace, .make = make_muon, .check = check_muon, .any_count = true};
}

}  // namespace kiln::cuda

#include "kernels/low_rank.h"

#include <algorithm>
#include <vector>

#include "base/rng.h"
#include "kernels/context.h"
#include "kernels/launch.cuh"
#include "optim/low_rank_adam.h"

namespace kiln::cuda {
namespace {

constexpr int kPasses = 2, kColdPasses = 4, kTileSide = 128, kAlignment = 8;  // kTileSide also of panels

struct Geometry {
  int m, n, rank;
  bool right;
  int vectors() const { return right ? m : n; }
  int side() const { return right ? n : m; }
};

Geometry geometry(const LowRankAdamUpdate& op) {
  const Shape& shape = op.parameter().shape;
  const std::int64_t rank = std::min({op.options().rank, shape[0], shape[1]});
  return {static_cast<int>(shape[0]), static_cast<int>(shape[1]), static_cast<int>(rank),
          projection_side(shape) == ProjectionSide::right};
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
std::size_t projected_bytes(const Geometry& at) {
  return aligned(sizeof(float) * static_cast<std::size_t>(at.vectors()) * static_cast<std::size_t>(at.rank));
}
std::size_t vector_bytes(const Geometry& at) { return aligned(sizeof(float) * static_cast<std::size_t>(at.vectors())); }
/// What stays from the projection of one matrix to its update.
std::size_t matrix_bytes(const Geometry& at) {
  return projected_bytes(at) + 3 * vector_bytes(at) + aligned(sizeof(float)) +
         low_rank_panel_bytes(at.side(), at.rank) + low_rank_panel_bytes(at.vectors(), at.rank);
}

/// The group's scratch: every matrix's own, and one refresh's.
struct Layout {
  std::size_t matrices = 0;
  Geometry largest{};  // sides and rank, each the largest of all

  explicit Layout(const Nodes& nodes) {
    int vectors = 0, side = 0, rank = 0;
    for (std::size_t i = 0; i < nodes.group.count; ++i) {
      const Geometry at = geometry(nodes.op<LowRankAdamUpdate>(i));
      matrices += matrix_bytes(at);
      vectors = std::max(vectors, at.vectors());
      side = std::max(side, at.side());
      rank = std::max(rank, at.rank);
    }
    largest = {.m = vectors, .n = side, .rank = rank, .right = true};
  }
  std::size_t refresh() const { return refresh_scratch_bytes(largest.m, largest.n, largest.rank); }
};

std::size_t workspace(const Nodes& nodes) {
  const Layout layout(nodes);
  return layout.matrices + layout.refresh();
}

LowRankStep step_of(const LowRankAdamUpdate::Options& o) {
  const bool residual = o.residual == Residual::scaled, paper = o.variant == FiraVariant::paper;
  const double k = paper ? 1.0 : o.alpha;
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .back = o.alpha,
          .outside = residual ? (paper ? o.alpha : 1.0) : 0.0,
          .inside = residual ? 1.0 : 0.0,
          .inside_square = 2 * k - k * k,
          .gamma = o.gamma,
          .residual = residual,
          .rotate = o.rotate,
          .rotation_step = kRotationStep,
          .seed = o.seed};
}

/// All neighbouring low-rank updates of a plan, in seven launches.
class LowRankKernel final : public Kernel {
 public:
  LowRankKernel(const Nodes& nodes, Context& context)
      : stream_(context.stream),
        multiprocessors_(context.multiprocessors),
        half_gradient_(nodes.inputs()[1].dtype == DType::bf16),
        layout_(nodes) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) {
      require(nodes.inputs(i)[1].dtype == nodes.inputs()[1].dtype, "{}: gradients of {} and of {}, expected one type",
              nodes.node().op->name(), to_string(nodes.inputs()[1].dtype), to_string(nodes.inputs(i)[1].dtype));
      ops_.push_back(&nodes.op<LowRankAdamUpdate>(i));
      const Geometry at = geometry(*ops_.back());
      require(at.n % kAlignment == 0 && at.m % kAlignment == 0 && at.rank % kAlignment == 0,
              "{}: {} of rank {}, expected multiples of {}; set optimizer.rank, or train on the CPU",
              ops_.back()->parameter().name, ops_.back()->parameter().shape.str(), at.rank, kAlignment);
      require(at.rank <= kLargestRefreshRank, "{}: optimizer.rank {}, expected at most {}",
              ops_.back()->parameter().name, at.rank, kLargestRefreshRank);
      add_pieces(static_cast<int>(i), at);
    }
    const std::size_t pieces = basis_.size() + project_.size() + moments_.size() + direction_.size() + apply_.size();
    matrices_ = context.allocate(ops_.size() * sizeof(LowRankMatrix), "table of low-rank updates");
    pieces_ = context.allocate(pieces * sizeof(LowRankPiece), "table of low-rank updates");
  }

  void bind(std::span<const KernelArgs> nodes) override {
    auto* memory = static_cast<std::byte*>(nodes.front().workspace.data);
    auto cut = [&](std::size_t bytes) {
      auto* here = reinterpret_cast<float*>(memory);
      memory += bytes;
      return here;
    };
    std::vector<LowRankMatrix> matrices;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      const UpdateArgs a = ops_[i]->arguments(nodes[i]);
      const Geometry at = geometry(*ops_[i]);
      const Parameter& parameter = ops_[i]->parameter();
      LowRankMatrix t{};
      t.w = static_cast<std::uint16_t*>(a.w.data);
      t.low = static_cast<std::uint16_t*>(a.low.data);
      t.g = a.g.data;
      t.q = a.states[0].as<float>();
      t.moment = a.states[1].data;
      t.square = a.states[2].data;
      t.limiter = a.states.size() > 3 ? a.states[3].as<float>() : nullptr;
      t.m = at.m;
      t.n = at.n;
      t.rank = at.rank;
      t.refresh_offset = static_cast<std::int32_t>(ops_[i]->schedule().offset);
      t.stream = stream_of(parameter.name.c_str());
      t.moment_stream = stream_of((parameter.name + ".exp_avg").c_str());
      t.square_stream = stream_of((parameter.name + ".exp_avg_sq").c_str());
      t.right = at.right;
      t.decay = parameter.decay;
      t.projected = cut(projected_bytes(at));
      t.squares = cut(vector_bytes(at));
      t.phi = cut(vector_bytes(at));
      t.share = cut(vector_bytes(at));
      t.factor = cut(aligned(sizeof(float)));
      t.basis = reinterpret_cast<std::uint16_t*>(cut(low_rank_panel_bytes(at.side(), at.rank)));
      t.direction = reinterpret_cast<std::uint16_t*>(cut(low_rank_panel_bytes(at.vectors(), at.rank)));
      t.gradient = low_rank_gradient_map(t, half_gradient_);
      matrices.push_back(t);
    }
    scratch_ = cut_refresh_scratch(memory, layout_.largest.m, layout_.largest.n, layout_.largest.rank);
    std::vector<LowRankPiece> pieces;
    for (const auto* part : {&basis_, &project_, &moments_, &direction_, &apply_})
      pieces.insert(pieces.end(), part->begin(), part->end());
    copy_to_device(matrices_, matrices.data(), stream_);
    copy_to_device(pieces_, pieces.data(), stream_);
  }

  void run(std::span<const KernelArgs> nodes) override {
    const auto* pieces = reinterpret_cast<const LowRankPiece*>(pieces_.data());
    LowRankTable table{.matrices = reinterpret_cast<const LowRankMatrix*>(matrices_.data()),
                       .pieces = nullptr,
                       .count = static_cast<int>(ops_.size()),
                       .rank = layout_.largest.rank,
                       .multiprocessors = multiprocessors_,
                       .half_gradient = half_gradient_,
                       .half_states = ops_.front()->options().states == StatePrecision::bf16,
                       .scalars = nodes.front().in[2].as<double>(),
                       .step = step_of(ops_.front()->options()),
                       .stream = stream_};
    low_rank_refresh(
        table, scratch_,
        {.passes = kPasses, .cold_passes = kColdPasses, .every = static_cast<int>(ops_.front()->options().refresh)});
    auto take = [&](const std::vector<LowRankPiece>& part) {
      table.pieces = pieces;
      table.count = static_cast<int>(part.size());
      pieces += part.size();
    };
    take(basis_);
    low_rank_basis(table);
    take(project_);
    low_rank_project(table);
    take(moments_);
    low_rank_moments(table);
    if (table.step.residual) {
      table.count = static_cast<int>(ops_.size());
      low_rank_limit(table);
    }
    take(direction_);
    low_rank_direction(table);
    take(apply_);
    low_rank_apply(table);
  }

 private:
  void add_pieces(int matrix, const Geometry& at) {
    for (int row = 0; row < at.side(); row += kTileSide) basis_.push_back({matrix, row, 0});
    for (int v = 0; v < at.vectors(); v += kTileSide) {
      for (int c = 0; c < at.rank; c += low_rank_project_width(layout_.largest.rank))
        project_.push_back({matrix, v, c});
      direction_.push_back({matrix, v, 0});
      for (int u = 0; u < at.side(); u += kTileSide)
        apply_.push_back(at.right ? LowRankPiece{matrix, v, u} : LowRankPiece{matrix, u, v});
    }
    const int vectors = std::max(1, kMomentsGroups * kAlignment / at.rank);
    for (int v = 0; v < at.vectors(); v += vectors) moments_.push_back({matrix, v, vectors});
  }

  cudaStream_t stream_;
  int multiprocessors_;
  bool half_gradient_;
  Layout layout_;
  std::vector<const LowRankAdamUpdate*> ops_;
  std::vector<LowRankPiece> basis_, project_, moments_, direction_, apply_;
  Buffer matrices_, pieces_;
  RefreshScratch scratch_{};
};

std::unique_ptr<Kernel> make_low_rank(const Nodes& nodes, Context& context) {
  require(nodes.inputs()[0].dtype == DType::bf16, "{}: weights of {}, expected bf16", nodes.node().op->name(),
          to_string(nodes.inputs()[0].dtype));
  const LowRankAdamUpdate::Options& o = nodes.op<LowRankAdamUpdate>().options();
  require(o.projector == ProjectorKind::power, "optimizer.projector: svd runs on the CPU alone; use power");
  require(o.states != StatePrecision::int8,
          "optimizer.states: {} for low-rank moments runs on the CPU alone; use fp32 or bf16", to_string(o.states));
  require(o.projector_states == StatePrecision::fp32, "optimizer.projector_states: {} runs on the CPU alone; use fp32",
          to_string(o.projector_states));
  return std::make_unique<LowRankKernel>(nodes, context);
}

OpEntry entry(std::string_view name) {
  return {.name = name, .workspace_bytes = workspace, .make = make_low_rank, .any_count = true};
}

}  // namespace

OpEntry galore_entry() { return entry("galore_update"); }
OpEntry fira_entry() { return entry("fira_update"); }
OpEntry fira_plus_entry() { return entry("fira_plus_update"); }

}  // namespace kiln::cuda

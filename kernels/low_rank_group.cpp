#include "kernels/low_rank_group.h"

#include <algorithm>

#include "base/rng.h"
#include "kernels/aligned.h"
#include "kernels/low_rank_one.h"
#include "optim/projector.h"

namespace kiln::cuda {
namespace {

constexpr int kTileSide = 128, kAlignment = 8;  // kTileSide also of panels
static_assert(kOneRows == kTileSide);           // pieces of a basis

std::size_t projected_bytes(const LowRankGeometry& at) {
  return aligned(sizeof(float) * static_cast<std::size_t>(at.vectors()) * static_cast<std::size_t>(at.rank));
}
/// Of rank 1, P as it is; else panels.
std::size_t basis_bytes(const LowRankGeometry& at) {
  return at.rank == 1 ? aligned(sizeof(float) * static_cast<std::size_t>(at.side()))
                      : low_rank_panel_bytes(at.side(), at.rank);
}
std::size_t direction_bytes(const LowRankGeometry& at) {
  return at.rank == 1 ? 0 : low_rank_panel_bytes(at.vectors(), at.rank);
}
std::size_t vector_bytes(const LowRankGeometry& at) {
  return aligned(sizeof(float) * static_cast<std::size_t>(at.vectors()));
}

}  // namespace

LowRankGeometry low_rank_geometry(const Parameter& parameter, std::int64_t wanted_rank) {
  const Shape& shape = parameter.shape;
  const std::int64_t rank = std::min({wanted_rank, shape[0], shape[1]});
  return {static_cast<int>(shape[0]), static_cast<int>(shape[1]), static_cast<int>(rank),
          projection_side(shape) == ProjectionSide::right};
}

LowRankGeometry LowRankGroup::largest() const {
  int vectors = 0, side = 0, rank = 0;
  for (const LowRankGeometry& at : list_) {
    vectors = std::max(vectors, at.vectors());
    side = std::max(side, at.side());
    rank = std::max(rank, at.rank);
  }
  return {.m = vectors, .n = side, .rank = rank, .right = true};
}

std::size_t LowRankGroup::workspace_bytes() const {
  std::size_t bytes = 0;
  for (const LowRankGeometry& at : list_)
    bytes +=
        projected_bytes(at) + 3 * vector_bytes(at) + aligned(3 * sizeof(float)) + basis_bytes(at) + direction_bytes(at);
  return bytes;
}

void LowRankGroup::add_pieces(LowRankWork work, int matrix, const LowRankGeometry& at) {
  std::vector<LowRankPiece>& list = pieces_[static_cast<std::size_t>(work)];
  auto each = [](int end, int step, auto&& visit) {
    for (int first = 0; first < end; first += step) visit(first);
  };
  switch (work) {
    case LowRankWork::basis:
      return each(at.side(), kTileSide, [&](int row) { list.push_back({matrix, row, 0}); });
    case LowRankWork::project:
      if (at.rank == 1) {
        return each(at.vectors(), low_rank_one_vectors(at.right), [&](int v) { list.push_back({matrix, v, 0}); });
      }
      return each(at.vectors(), kTileSide, [&](int v) {
        each(at.rank, low_rank_project_width(largest().rank), [&](int c) { list.push_back({matrix, v, c}); });
      });
    case LowRankWork::moments: {
      const int vectors = low_rank_moment_vectors(at.rank, states_.moments);
      return each(at.vectors(), vectors, [&](int v) { list.push_back({matrix, v, vectors}); });
    }
    case LowRankWork::direction:
      return each(at.vectors(), kTileSide, [&](int v) { list.push_back({matrix, v, 0}); });
    case LowRankWork::apply:
      return each(at.vectors(), kTileSide, [&](int v) {
        each(at.side(), kTileSide, [&](int u) {
          list.push_back(at.right ? LowRankPiece{matrix, v, u} : LowRankPiece{matrix, u, v});
        });
      });
    case LowRankWork::scale:
      return each(at.m * (at.n / kAlignment), kScaleGroups, [&](int group) { list.push_back({matrix, group, 0}); });
  }
}

void LowRankGroup::prepare(const Nodes& nodes, Context& context, std::initializer_list<LowRankWork> works,
                           StatePrecision moments, StatePrecision basis) {
  stream_ = context.stream;
  multiprocessors_ = context.multiprocessors;
  half_gradient_ = nodes.inputs()[1].dtype == DType::bf16;
  code_maps_ = make_code_maps(context, moments == StatePrecision::int8 || basis == StatePrecision::int8);
  states_ = {moments, basis, reinterpret_cast<const CodeMaps*>(code_maps_.data())};
  for (std::size_t i = 0; i < list_.size(); ++i) {
    for (const LowRankWork work : works) add_pieces(work, static_cast<int>(i), list_[i]);
  }
  std::size_t pieces = 0;
  for (const std::vector<LowRankPiece>& part : pieces_) pieces += part.size();
  matrix_table_ = context.allocate(list_.size() * sizeof(LowRankMatrix), "table of low-rank updates");
  piece_table_ = context.allocate(pieces * sizeof(LowRankPiece), "table of low-rank updates");
}

LowRankMatrix LowRankGroup::matrix(std::size_t i, const UpdateArgs& args, const Parameter& parameter,
                                   std::byte*& memory) const {
  auto cut = [&](std::size_t bytes) {
    auto* here = reinterpret_cast<float*>(memory);
    memory += bytes;
    return here;
  };
  const LowRankGeometry& at = list_[i];
  LowRankMatrix t{};
  t.w = static_cast<std::uint16_t*>(args.w.data);
  t.low = static_cast<std::uint16_t*>(args.low.data);
  t.g = args.g.data;
  t.m = at.m;
  t.n = at.n;
  t.rank = at.rank;
  t.stream = stream_of(parameter.name.c_str());
  t.right = at.right;
  t.decay = parameter.decay;
  t.projected = cut(projected_bytes(at));
  t.squares = cut(vector_bytes(at));
  t.phi = cut(vector_bytes(at));
  t.share = cut(vector_bytes(at));
  t.factor = cut(aligned(3 * sizeof(float)));
  float* basis = cut(basis_bytes(at));
  if (at.rank == 1) t.q = basis;
  t.basis = reinterpret_cast<std::uint16_t*>(basis);
  t.direction = reinterpret_cast<std::uint16_t*>(cut(direction_bytes(at)));
  t.gradient = low_rank_gradient_map(t, half_gradient_);
  return t;
}

void LowRankGroup::upload(const std::vector<LowRankMatrix>& matrices) const {
  std::vector<LowRankPiece> all;
  for (const std::vector<LowRankPiece>& part : pieces_) all.insert(all.end(), part.begin(), part.end());
  copy_to_device(matrix_table_, matrices.data(), stream_);
  copy_to_device(piece_table_, all.data(), stream_);
}

LowRankTable LowRankGroup::table() const {
  LowRankTable table{};
  table.matrices = reinterpret_cast<const LowRankMatrix*>(matrix_table_.data());
  table.count = count();
  table.rank = largest().rank;
  table.multiprocessors = multiprocessors_;
  table.half_gradient = half_gradient_;
  table.states = states_;
  table.stream = stream_;
  return table;
}

LowRankTable LowRankGroup::with(LowRankWork work, LowRankTable table) const {
  table.pieces = reinterpret_cast<const LowRankPiece*>(piece_table_.data());
  for (std::size_t before = 0; before < static_cast<std::size_t>(work); ++before)
    table.pieces += pieces_[before].size();
  table.count = static_cast<int>(pieces_[static_cast<std::size_t>(work)].size());
  return table;
}

void require_matrices(const Nodes& nodes) {
  require(nodes.inputs()[0].dtype == DType::bf16, "{}: weights of {}, expected bf16", nodes.node().op->name(),
          to_string(nodes.inputs()[0].dtype));
  for (std::size_t i = 0; i < nodes.group.count; ++i) {
    const Parameter& parameter = nodes.op<UpdateOp>(i).parameter();
    const Shape& shape = parameter.shape;
    require(nodes.inputs(i)[1].dtype == nodes.inputs()[1].dtype, "{}: gradient of {}, expected {} as for {}",
            parameter.name, to_string(nodes.inputs(i)[1].dtype), to_string(nodes.inputs()[1].dtype),
            nodes.op<UpdateOp>().parameter().name);
    require(shape[0] % kAlignment == 0 && shape[1] % kAlignment == 0,
            "{}: {}, expected multiples of {}; train on the CPU", parameter.name, shape.str(), kAlignment);
  }
}

void require_low_rank(const Nodes& nodes, std::int64_t rank) {
  require_matrices(nodes);
  for (std::size_t i = 0; i < nodes.group.count; ++i) {
    const Parameter& parameter = nodes.op<UpdateOp>(i).parameter();
    const LowRankGeometry at = low_rank_geometry(parameter, rank);
    require(at.rank % kAlignment == 0,
            "{}: {} of rank {}, expected multiples of {}; set optimizer.rank, or train on the CPU", parameter.name,
            parameter.shape.str(), at.rank, kAlignment);
    require(at.rank <= kLargestRefreshRank, "{}: optimizer.rank {}, expected at most {}", parameter.name, at.rank,
            kLargestRefreshRank);
  }
}

}  // namespace kiln::cuda

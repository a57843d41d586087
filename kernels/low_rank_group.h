#pragma once
#include <array>
#include <vector>

#include "kernels/context.h"
#include "kernels/low_rank.h"
#include "optim/optimizer.h"

/// What the low-rank members share on the host: sizes, workspace and tables of all matrices of a group.
namespace kiln::cuda {

struct LowRankGeometry {
  int m, n, rank;
  bool right;
  int vectors() const { return right ? m : n; }
  int side() const { return right ? n : m; }
};
LowRankGeometry low_rank_geometry(const Parameter& parameter, std::int64_t rank);

/// What a kernel of low_rank.h takes pieces of.
enum class LowRankWork { basis, project, moments, direction, apply, scale };

class LowRankGroup {
 public:
  void add(const LowRankGeometry& at) { list_.push_back(at); }
  int count() const { return static_cast<int>(list_.size()); }
  /// Sides and rank, each the largest of all: vectors as rows.
  LowRankGeometry largest() const;
  /// What stays of all matrices from their projection to their update.
  std::size_t workspace_bytes() const;

  /// Makes the tables, with pieces for `works`, and says how states are stored.
  void prepare(const Nodes& nodes, Context& context, std::initializer_list<LowRankWork> works, StatePrecision moments,
               StatePrecision basis = StatePrecision::fp32);
  /// Matrix i with its tensors and its place in `memory`, which moves on. States and what depends on them are left to
  /// the caller.
  LowRankMatrix matrix(std::size_t i, const UpdateArgs& args, const Parameter& parameter, std::byte*& memory) const;
  /// Fills the tables.
  void upload(const std::vector<LowRankMatrix>& matrices) const;
  /// The launches' table, without a step's scalars and options; pieces of none.
  LowRankTable table() const;
  /// `table` with the pieces of a kernel.
  LowRankTable with(LowRankWork work, LowRankTable table) const;
  bool half_gradient() const { return half_gradient_; }

 private:
  void add_pieces(LowRankWork work, int matrix, const LowRankGeometry& at);

  std::vector<LowRankGeometry> list_;
  std::array<std::vector<LowRankPiece>, 6> pieces_;  // by LowRankWork
  bool half_gradient_ = false;
  int multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
  LowRankStates states_;
  Buffer matrix_table_, piece_table_, code_maps_;
};

/// Throws the usage Error of updates of matrices whose weights, gradients or sizes the GPU does not take.
void require_matrices(const Nodes& nodes);
/// The same, and of low-rank updates whose rank it does not take.
void require_low_rank(const Nodes& nodes, std::int64_t rank);

}  // namespace kiln::cuda

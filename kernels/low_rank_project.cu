#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_tile.cuh"

namespace kiln::cuda {
namespace {

/// Squares are summed by the blocks of the first columns of the rank.
template <Contiguous kOrder>
__device__ void project(const LowRankMatrix& t, const LowRankPiece& piece, float clip, bf16* shared) {
  using Product = TileProduct<kOrder, Contiguous::rows, false>;
  GradientFetch<kOrder> g(t, piece.row);
  BasisFetch<Contiguous::rows> q(t.q, t.side(), t.rank, piece.column);
  Product product;
  product.run(t.side(), shared, g, q);
  product.visit([&](int row, int column, float x, float y) {
    const int vector = piece.row + row, c = piece.column + column;
    if (vector >= t.vectors() || c >= t.rank) return;
    *reinterpret_cast<float2*>(t.projected + static_cast<std::int64_t>(vector) * t.rank + c) =
        make_float2(clip * x, clip * y);
  });
  if (piece.column == 0) g.store_squares(t, piece.row, clip * clip, reinterpret_cast<float*>(shared));
}

__global__ void __launch_bounds__(kTileThreads, 2)
    project_all(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
  bf16* shared = reinterpret_cast<bf16*>(memory);
  if (t.right)
    project<Contiguous::depth>(t, piece, clip, shared);
  else
    project<Contiguous::rows>(t, piece, clip, shared);
}

}  // namespace

void low_rank_project(const LowRankTable& table) {
  constexpr std::size_t kShared = TileProduct<Contiguous::depth, Contiguous::rows, false>::kSharedBytes;
  static_assert(kShared <= 48 * 1024);
  launch({"low_rank_project", static_cast<unsigned>(table.count), kTileThreads, table.stream, kShared}, project_all,
         table.matrices, table.pieces, table.scalars);
}

}  // namespace kiln::cuda

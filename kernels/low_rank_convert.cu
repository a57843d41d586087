#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_panels.cuh"
#include "kernels/philox.cuh"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

/// The operands that the products of a step read many times, as panels of bf16. Elementwise passes: the products would
/// otherwise round the same numbers again for every tile, from twice the bytes.
namespace kiln::cuda {
namespace {

constexpr int kThreads = 256;

/// Writes a panel [128, columns] of a matrix of `rows`: element(row, column) gives eight numbers. Neighbouring threads
/// take neighbouring chunks of a row.
template <int kUnroll = 4, typename F>
__device__ void fill_panel(std::uint16_t* panels, int first, int rows, int columns, bool permute, F&& element) {
  const int chunks = panel_parts(columns) * (kPanelColumns / 8);
#pragma unroll kUnroll
  for (int i = static_cast<int>(threadIdx.x); i < kPanelRows * chunks; i += kThreads) {
    const int row = first + i / chunks, chunk = i % chunks;
    const bool inside = row < rows && chunk * 8 < columns;
    const Float8 x = inside ? element(row, chunk * 8) : Float8{};
    *panel_chunk(panels, columns, permute ? permuted(row) : row, chunk) = pack(x).bits;
  }
}

/// Rows of Q are columns of W where vectors are rows: they are then permuted for apply, and with them the depth of
/// project's product.
template <typename State>
__global__ void __launch_bounds__(kThreads)
    basis_of(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, const CodeMaps* maps) {
  if (skipped(scalars)) return;
  const StateAccess<State> access(maps);
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const StatePointer q = t.projector;
  const int rank = t.rank;
  fill_panel(t.basis, piece.row, t.side(), rank, t.right, [&](int row, int column) {
    return access.values(access.load(q, static_cast<std::int64_t>(row) * rank + column), StateValues::any);
  });
}

/// P of this step: optim/apollo.h.
__global__ void __launch_bounds__(kThreads) random_basis_of(const LowRankMatrix* matrices, const LowRankPiece* pieces,
                                                            const double* scalars, int every, std::uint64_t seed) {
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const int rank = t.rank;
  const float deviation = rsqrtf(static_cast<float>(rank));
  const std::uint64_t stream = projection_stream(t, scalars, every);
  fill_panel<1>(t.basis, piece.row, t.side(), rank, t.right, [&](int row, int column) {
    const std::uint64_t first = static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>(rank) + column;
    Float8 x;
#pragma unroll
    for (int j = 0; j < 8; ++j) x.v[j] = deviation * normal(philox(seed, stream, first + j));
    return x;
  });
}

__global__ void __launch_bounds__(kThreads)
    direction_of(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, float inside) {
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const float* projected = t.projected;
  const float* phi = t.phi;
  const float scale = inside != 0 ? inside * *t.factor : 0.0f;
  const int rank = t.rank;
  fill_panel(t.direction, piece.row, t.vectors(), rank, !t.right, [&](int row, int column) {
    const uint4* from = reinterpret_cast<const uint4*>(projected + static_cast<std::int64_t>(row) * rank + column);
    const uint4 a = from[0], b = from[1];
    const float factor = scale != 0 ? scale * phi[row] : 0.0f;
    auto one = [&](std::uint32_t pair) {
      return __uint_as_float(pair << 16) - factor * __uint_as_float(pair & 0xffff0000u);
    };
    return Float8{{one(a.x), one(a.y), one(a.z), one(a.w), one(b.x), one(b.y), one(b.z), one(b.w)}};
  });
}

}  // namespace

std::size_t low_rank_panel_bytes(int rows, int columns) {
  return static_cast<std::size_t>(panel_count(rows)) * static_cast<std::size_t>(panel_parts(columns)) * kPanelPartBytes;
}

void low_rank_basis(const LowRankTable& table) {
  launch({"low_rank_basis", static_cast<unsigned>(table.count), kThreads, table.stream},
         of_states(table.states.basis, basis_of<float>, basis_of<bf16>, basis_of<std::uint8_t>), table.matrices,
         table.pieces, table.scalars, table.states.maps);
}

void low_rank_random_basis(const LowRankTable& table, int every) {
  launch({"low_rank_random_basis", static_cast<unsigned>(table.count), kThreads, table.stream}, random_basis_of,
         table.matrices, table.pieces, table.scalars, every, table.step.seed);
}

void low_rank_direction(const LowRankTable& table) {
  launch({"low_rank_direction", static_cast<unsigned>(table.count), kThreads, table.stream}, direction_of,
         table.matrices, table.pieces, table.scalars,
         table.step.residual ? static_cast<float>(table.step.inside) : 0.0f);
}

}  // namespace kiln::cuda

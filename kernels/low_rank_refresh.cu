#include <algorithm>
#include <type_traits>

#include "kernels/aligned.h"
#include "kernels/launch.cuh"
#include "kernels/low_rank_cholesky.cuh"
#include "kernels/low_rank_rotate.cuh"
#include "kernels/philox.cuh"

/// New bases: Q <- orth(G' (G Q)), twice. Everything happens in one cooperative launch, whose blocks share out the
/// tiles of each product and meet at barriers of about 2 us, so that small matrices are a matter of latency: the depth
/// of a product is cut until every block has a part.
///
/// Operands of the power iteration are rounded to bf16. That disturbs the gradient by 2^-9 of each element, and the
/// energy of the subspace only to second order. The columns are made orthonormal from an f64 Gram matrix, with operands
/// split in two bf16. Moments that follow the basis turn in the same launch, right after it.
namespace kiln::cuda {
namespace {

constexpr int kBlocksOfOne = 1;  // of a multiprocessor: two have too few registers
constexpr int kPartTiles = 528;  // parts of products that the scratch has room for
constexpr int kRounds = 4;
constexpr double kSmallAngle = 5e-4;  // between columns that a product to first order makes orthonormal to 1e-6
constexpr std::size_t kSharedBytes = 80 * 1024;

/// Into how many parts the depth of a product is cut: the best of those that fill the blocks one to four times, by the
/// steps of the busiest block and the pass that adds the parts up.
__device__ int product_splits(int tiles, int depth, int blocks) {
  constexpr int kOverhead = 4;  // in steps: prologue, output
  const int steps = (depth + kTileDepth - 1) / kTileDepth;
  int best = 1, least = (tiles + blocks - 1) / blocks * (steps + kOverhead);
  for (int waves = 1; waves <= 4; ++waves) {
    const int splits = min(min(waves * blocks, kPartTiles) / tiles, steps);
    if (splits < 2) continue;
    const int cost = waves * ((steps + splits - 1) / splits + kOverhead) + kOverhead + splits / 2;
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

/// out [rows, columns] = A [rows, depth] B [depth, columns]. a(row) and b(column) make the fetches of the operands
/// whose first row, or column, that is; B's columns lie next to each other. Ends with a barrier.
template <Contiguous kOrder, bool kSplit, typename A, typename B>
__device__ void multiply(int rows, int columns, int depth, const A& a, const B& b, float* out, const RefreshScratch& s,
                         Grid& grid, bf16* shared) {
  const int across = (columns + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * across;
  const int splits = product_splits(tiles, depth, grid.blocks());
  const int length = (depth + splits * kTileDepth - 1) / (splits * kTileDepth) * kTileDepth;
  const std::int64_t elements = static_cast<std::int64_t>(rows) * columns;
  for (int item = grid.block(); item < tiles * splits; item += grid.blocks()) {
    const int split = item / tiles, tile = item % tiles, row = tile / across * kTile, column = tile % across * kTile;
    float* to = splits == 1 ? out : s.parts + split * elements;
    TileProduct<kOrder, Contiguous::rows, kSplit> product;
    product.run(split * length, min(depth, (split + 1) * length), shared, a(row), b(column));
    product.visit([&](int i, int j, float x, float y) {
      if (row + i < rows && column + j < columns)
        *reinterpret_cast<float2*>(to + static_cast<std::int64_t>(row + i) * columns + column + j) = make_float2(x, y);
    });
  }
  grid.wait();
  if (splits == 1) return;
  for (std::int64_t e = grid.thread() * 4; e < elements; e += grid.threads() * 4) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float4 x = *reinterpret_cast<const float4*>(s.parts + split * elements + e);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *reinterpret_cast<float4*>(out + e) = sum;
  }
  grid.wait();
}

/// out [rows, rank] = A [rows, depth] b [depth, rank]; A is g [m, n] or its transpose. Ends with a barrier.
template <typename G, Contiguous kOrder>
__device__ void multiply_gradient(const LowRankMatrix& t, int rows, int depth, const float* b, float* out,
                                  const RefreshScratch& s, Grid& grid, bf16* shared) {
  const int rank = t.rank;
  multiply<kOrder, false>(
      rows, rank, depth, [&](int row) { return MatrixFetch<kOrder, G>(static_cast<const G*>(t.g), t.m, t.n, row); },
      [&](int column) { return MatrixFetch<Contiguous::rows>(b, depth, rank, column); }, out, s, grid, shared);
}

/// out = x T' or x - x T', x [rows, rank], T = s.triangle, lower. Ends with a barrier.
template <bool kSubtract>
__device__ void multiply_triangle(const float* x, int rows, int rank, float* out, const RefreshScratch& s, Grid& grid,
                                  bf16* shared) {
  const int columns = (rank + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * columns;
  for (int tile = grid.block(); tile < tiles; tile += grid.blocks()) {
    const int row = tile / columns * kTile, column = tile % columns * kTile;
    TileProduct<Contiguous::depth, Contiguous::depth, true> product;
    product.run(0, min(rank, column + kTile), shared, MatrixFetch<Contiguous::depth>(x, rows, rank, row),
                MatrixFetch<Contiguous::depth>(s.triangle, rank, rank, column));
    product.visit([&](int i, int j, float a, float b) {
      if (row + i >= rows || column + j >= rank) return;
      const std::int64_t at = static_cast<std::int64_t>(row + i) * rank + column + j;
      if constexpr (kSubtract) {
        const float2 old = *reinterpret_cast<const float2*>(x + at);
        a = old.x - a, b = old.y - b;
      }
      *reinterpret_cast<float2*>(out + at) = make_float2(a, b);
    });
  }
  grid.wait();
}

/// Columns of s.outer [rows, rank], made orthonormal, each along the column it came from: CholeskyQR (Yamamoto et al.
/// 2015) with the Gram matrix in f64, so that the squares of condition numbers up to 1e6 fit. A column that the others
/// hold up to rounding keeps its rounding, which another round makes orthogonal (Fukaya et al. 2020). Between passes
/// one round is enough; at the end rounds follow until the angles left are small, and a product to first order takes
/// them out. False when that never happens: `out` is then as it was. Ends with a barrier.
__device__ bool orthonormalise(RefreshScratch& s, int rows, int rank, bool last, float* out, Grid& grid,
                               unsigned char* shared) {
  double* doubles = reinterpret_cast<double*>(shared);
  bf16* operands = reinterpret_cast<bf16*>(shared);
  auto flag = [](const std::uint32_t* p) { return *reinterpret_cast<const volatile std::uint32_t*>(p) != 0; };
  for (int round = 0;; ++round) {
    gram_parts(s.outer, rows, rank, s, grid, doubles);
    if (grid.block() == 0 && threadIdx.x == 0) *s.lost = *s.large = 0;
    grid.wait();
    collect_gram(rows, rank, kSmallAngle, s, grid);
    grid.wait();
    if (!flag(s.large)) {
      multiply_triangle<true>(s.outer, rows, rank, out, s, grid, operands);
      return true;
    }
    if (round == kRounds) return false;
    // The identity's part of the triangle is below the diagonal's; above it stays zero, where first order had angles.
    invert_factor(s, rank, grid, doubles);
    grid.wait();
    const bool done = !last && !flag(s.lost);
    multiply_triangle<false>(s.outer, rows, rank, done ? out : s.other, s, grid, operands);
    if (done) return true;
    float* swap = s.outer;
    s.outer = s.other;
    s.other = swap;
  }
}

/// The basis as it is stored, in f32 in t.q: this thread's part. Calls, since the products need all registers.
template <typename State>
__device__ __noinline__ void load_basis(const LowRankMatrix& t, const CodeMaps* maps) {
  const StateAccess<State> access(maps);
  const std::int64_t elements = static_cast<std::int64_t>(t.side()) * t.rank;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i * 8 < elements;
       i += threads)
    store_whole(t.q + i * 8, access.values(access.load(t.projector, i * 8), StateValues::any));
}
/// Stores this thread's part of a basis, and leaves in `basis` what later steps will see of it.
template <typename State>
__device__ __noinline__ void store_basis(const LowRankMatrix& t, float* basis, const CodeMaps* maps) {
  const StateAccess<State> access(maps);
  const std::int64_t elements = static_cast<std::int64_t>(t.side()) * t.rank;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; !access.done(i * 8, elements);
       i += threads) {
    const bool inside = i * 8 < elements;
    const std::int64_t at = inside ? i * 8 : 0;  // 0: beside others of its warp
    const Float8 seen = access.store_nearest(t.projector, at, load_state(basis + at), StateValues::any, inside);
    if (inside) store_whole(basis + at, seen);
  }
}

/// The moments turn from t.q to the basis in s.basis, which takes its place where t.q is what is stored. Ends with a
/// barrier.
template <typename State>
__device__ void turn_moments(const LowRankMatrix& t, const RefreshScratch& s, double done, const LowRankStep& step,
                             const LowRankStates& states, Grid& grid, bf16* shared) {
  const int side = t.side(), rank = t.rank;
  float* turn = s.triangle;
  multiply<Contiguous::rows, true>(
      rank, rank, side, [&](int row) { return MatrixFetch<Contiguous::rows>(t.q, side, rank, row); },
      [&](int column) { return MatrixFetch<Contiguous::rows>(s.basis, side, rank, column); }, turn, s, grid, shared);
  rotate_moments<State>(t, turn, done, step, states.maps, s.inner, t.projected, grid, shared);
  if (states.basis != StatePrecision::fp32) return grid.wait();
  const std::int64_t elements = static_cast<std::int64_t>(side) * rank;
  for (std::int64_t e = grid.thread() * 4; e < elements; e += grid.threads() * 4)
    *reinterpret_cast<float4*>(t.q + e) = *reinterpret_cast<const float4*>(s.basis + e);
  grid.wait();
}

/// `done` steps came before. Moments of State turn with the basis; void: they stay.
template <typename G, typename State>
__device__ void refresh_one(const LowRankMatrix& t, RefreshScratch s, const RefreshPasses& options, double done,
                            const LowRankStep& step, const LowRankStates& states, Grid& grid, unsigned char* shared) {
  const int side = t.side(), vectors = t.vectors();
  constexpr bool kRotate = !std::is_void_v<State>;
  bf16* operands = reinterpret_cast<bf16*>(shared);
  const bool cold = done == 0, rotate = kRotate && !cold;
  const bool half = states.basis == StatePrecision::bf16, coded = states.basis == StatePrecision::int8;
  if ((half || coded) && !cold) {
    half ? load_basis<bf16>(t, states.maps) : load_basis<std::uint8_t>(t, states.maps);
    grid.wait();
  }
  if (cold) {
    const std::int64_t elements = static_cast<std::int64_t>(side) * t.rank;
    for (std::int64_t e = grid.thread(); e < elements; e += grid.threads())
      s.outer[e] = normal(philox(step.seed, t.stream, static_cast<std::uint64_t>(e)));
    grid.wait();
    orthonormalise(s, side, t.rank, true, t.q, grid, shared);
  }
  const float* q = t.q;
  const int passes = cold ? options.cold_passes : options.passes;
  bool found = true;
  for (int pass = 0; found && pass < passes; ++pass) {
    if (t.right) {
      multiply_gradient<G, Contiguous::depth>(t, vectors, side, q, s.inner, s, grid, operands);
      multiply_gradient<G, Contiguous::rows>(t, side, vectors, s.inner, s.outer, s, grid, operands);
    } else {
      multiply_gradient<G, Contiguous::rows>(t, vectors, side, q, s.inner, s, grid, operands);
      multiply_gradient<G, Contiguous::depth>(t, side, vectors, s.inner, s.outer, s, grid, operands);
    }
    const bool last = pass + 1 == passes;
    found = orthonormalise(s, side, t.rank, last, last && !rotate ? t.q : s.basis, grid, shared);
    q = s.basis;
  }
  if (!found && !cold) return;
  if (half || coded) {
    float* basis = rotate ? s.basis : t.q;
    half ? store_basis<bf16>(t, basis, states.maps) : store_basis<std::uint8_t>(t, basis, states.maps);
    grid.wait();
  }
  if constexpr (kRotate)
    if (rotate) turn_moments<State>(t, s, done, step, states, grid, operands);
}

template <typename G, typename State>
__global__ void __launch_bounds__(kTileThreads, kBlocksOfOne)
    refresh(const LowRankMatrix* matrices, int count, const double* scalars, RefreshScratch scratch,
            RefreshPasses options, LowRankStep step, LowRankStates states) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (skipped(scalars)) return;
  const double done = scalars[static_cast<int>(Scalar::step)] - 1;
  Grid grid(scratch.barrier);
  for (int i = 0; i < count; ++i) {
    if (done != 0 && static_cast<std::int64_t>(done) % options.every != matrices[i].refresh_offset) continue;
    refresh_one<G, State>(matrices[i], scratch, options, done, step, states, grid, memory);
  }
}

template <typename State>
__global__ void __launch_bounds__(kTileThreads, kBlocksOfOne)
    turn(const LowRankMatrix* matrices, int index, RefreshScratch scratch, LowRankStep step, double done,
         LowRankStates states) {
  extern __shared__ __align__(128) unsigned char memory[];
  Grid grid(scratch.barrier);
  turn_moments<State>(matrices[index], scratch, done, step, states, grid, reinterpret_cast<bf16*>(memory));
}

template <typename State>
__global__ void __launch_bounds__(kTileThreads)
    load_basis_of(const LowRankMatrix* matrices, int index, const CodeMaps* maps) {
  load_basis<State>(matrices[index], maps);
}
template <typename State>
__global__ void __launch_bounds__(kTileThreads)
    store_basis_of(const LowRankMatrix* matrices, int index, float* basis, const CodeMaps* maps) {
  store_basis<State>(matrices[index], basis, maps);
}

/// Calls visit(pointer of the scratch, bytes) for each of its arrays.
template <typename F>
void visit_scratch(RefreshScratch& s, int vectors, int side, int rank, F&& visit) {
  const auto v = static_cast<std::size_t>(vectors), u = static_cast<std::size_t>(side),
             r = static_cast<std::size_t>(rank);
  // A smaller matrix may be cut into more parts than the largest: room for all that the limits allow.
  const std::size_t parts = std::size_t{kPartTiles} * kTile * kTile,
                    gram = std::max(r * r, std::size_t{2 * kGramItems} * kBlock * kBlock);
  visit(s.barrier, std::size_t{256});
  visit(s.inner, v * r * sizeof(float));
  visit(s.outer, u * r * sizeof(float));
  visit(s.other, u * r * sizeof(float));
  visit(s.basis, u * r * sizeof(float));
  visit(s.parts, parts * sizeof(float));
  visit(s.gram_parts, gram * sizeof(double));
  visit(s.gram, r * r * sizeof(double));
  visit(s.inverse, r * r * sizeof(double));
  visit(s.square, r * sizeof(double));
  visit(s.triangle, r * r * sizeof(float));
}

/// A kernel whose blocks all run at the same time, one on each multiprocessor.
template <typename... Parameters, typename... Arguments>
void launch_together(const char* name, void (*kernel)(Parameters...), const LowRankTable& table,
                     const RefreshScratch& scratch, Arguments... arguments) {
  check_cuda(cudaMemsetAsync(scratch.barrier, 0, 256, table.stream), "cudaMemsetAsync");
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(kBlocksOfOne * table.multiprocessors);
  config.blockDim = kTileThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = table.stream;
  config.attrs = &together;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

template <typename G, typename State>
void launch_refresh(const LowRankTable& table, const RefreshScratch& scratch, const RefreshPasses& options) {
  static_assert(kSharedBytes >= TileProduct<Contiguous::depth, Contiguous::depth, true>::kSharedBytes);
  static_assert(kSharedBytes >= TileProduct<Contiguous::depth, Contiguous::rows, true>::kSharedBytes);
  static_assert(kSharedBytes >= kCholeskyBytes);
  static const bool allowed [[maybe_unused]] = [] {
    check_cuda(cudaFuncSetAttribute(refresh<G, State>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "cudaFuncSetAttribute");
    return true;
  }();
  launch_together("low_rank_refresh", refresh<G, State>, table, scratch, table.matrices, table.count, table.scalars,
                  scratch, options, table.step, table.states);
}

}  // namespace

std::size_t refresh_scratch_bytes(int vectors, int side, int rank) {
  RefreshScratch s{};
  std::size_t total = 0;
  visit_scratch(s, vectors, side, rank, [&](auto&, std::size_t bytes) { total += aligned(bytes); });
  return total;
}

RefreshScratch cut_refresh_scratch(void* memory, int vectors, int side, int rank) {
  auto* p = static_cast<std::byte*>(memory);
  RefreshScratch s{};
  visit_scratch(s, vectors, side, rank, [&](auto& array, std::size_t bytes) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(p);
    p += aligned(bytes);
  });
  s.lost = s.barrier + 32;  // a cache line of their own
  s.large = s.lost + 1;
  return s;
}

void low_rank_refresh(const LowRankTable& table, const RefreshScratch& scratch, const RefreshPasses& options) {
  auto launch_for = [&]<typename G>() {
    if (!table.step.rotate) return launch_refresh<G, void>(table, scratch, options);
    of_states(table.states.moments, launch_refresh<G, float>, launch_refresh<G, bf16>, launch_refresh<G, std::uint8_t>)(
        table, scratch, options);
  };
  table.half_gradient ? launch_for.operator()<bf16>() : launch_for.operator()<float>();
}

void low_rank_load_basis(const LowRankTable& table, int index) {
  if (table.states.basis == StatePrecision::fp32) return;
  launch({"low_rank_load_basis", static_cast<unsigned>(table.multiprocessors), kTileThreads, table.stream},
         table.states.basis == StatePrecision::bf16 ? load_basis_of<bf16> : load_basis_of<std::uint8_t>, table.matrices,
         index, table.states.maps);
}

void low_rank_store_basis(const LowRankTable& table, int index, float* basis) {
  if (table.states.basis == StatePrecision::fp32) return;
  launch({"low_rank_store_basis", static_cast<unsigned>(table.multiprocessors), kTileThreads, table.stream},
         table.states.basis == StatePrecision::bf16 ? store_basis_of<bf16> : store_basis_of<std::uint8_t>,
         table.matrices, index, basis, table.states.maps);
}

void low_rank_turn(const LowRankTable& table, const RefreshScratch& scratch, int index, double done) {
  auto launch_for = [&]<typename State>() {
    static const bool allowed [[maybe_unused]] = [] {
      check_cuda(cudaFuncSetAttribute(turn<State>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
                 "cudaFuncSetAttribute");
      return true;
    }();
    launch_together("low_rank_turn", turn<State>, table, scratch, table.matrices, index, scratch, table.step, done,
                    table.states);
  };
  if (table.states.moments == StatePrecision::int8) return launch_for.operator()<std::uint8_t>();
  table.states.moments == StatePrecision::bf16 ? launch_for.operator()<bf16>() : launch_for.operator()<float>();
}

}  // namespace kiln::cuda

#pragma once
#include <type_traits>

#include "kernels/hopper.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_panels.cuh"
#include "kernels/vector.cuh"

/// What feeds low_rank_apply: its shared memory, the walk of a block along its tiles, the warp that keeps the operands
/// coming, and the copies of what is updated.
namespace kiln::cuda::apply {

inline constexpr int kThreads = 384, kGroups = 2, kTileSide = 128;

/// Shared memory: slots of the panel and stages of Q, 16 KB each; halves of tiles, 64 KB each, 48 KB with G in bf16.
template <typename T, int kSlotsValue, int kStagesValue, int kAheadValue>
struct Config {
  using Element = T;  // of G
  static constexpr int kSlots = kSlotsValue, kStages = kStagesValue, kAhead = kAheadValue;
  static constexpr int kFetchBytes = kTileSide * kTileSide / 2 * (sizeof(T) + 4);  // of G, W and lower halves
  static constexpr int kFetched = (kSlots + kStages) * kPanelPartBytes;
  static constexpr int kBarriers = kFetched + kAhead * kFetchBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * (kSlots + kStages) * 8;
  static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");
};
/// Ranks up to 256.
template <typename T>
using Low = Config<T, 4, std::is_same_v<T, float> ? 2 : 4, 2>;
/// A panel of a rank above 512 is loaded for every tile.
template <typename T>
using High = Config<T, 8, std::is_same_v<T, float> ? 2 : 3, 1>;

/// What the warps need of a matrix, copied from the table where it changes: a read of the table in the loop would cost
/// a trip to L2 under load.
struct Matrix {
  int index = -1;
  std::uint16_t *w, *low;
  const void* g;
  const float* phi;
  const std::uint16_t *basis, *direction;
  std::uint64_t stream;
  float factor;
  int m, n, rank, parts;
  bool right, decay;

  __device__ void select(const LowRankMatrix* matrices, int which, bool gradient) {
    if (index == which) return;
    index = which;
    const LowRankMatrix& t = matrices[which];
    w = t.w, low = t.low, g = t.g, phi = t.phi, basis = t.basis, direction = t.direction, stream = t.stream;
    m = t.m, n = t.n, rank = t.rank, parts = panel_parts(t.rank), right = t.right, decay = t.decay;
    factor = gradient ? *t.factor : 0.0f;
  }
  __device__ int side() const { return right ? n : m; }
};

/// The tiles of one block: neighbours in the list. Pieces are asked for a tile ahead.
template <class C>
struct Walk {
  const LowRankMatrix* matrices;
  const LowRankPiece* pieces;
  int first, last;

  __device__ Walk(const LowRankMatrix* all, const LowRankPiece* list, int count) : matrices(all), pieces(list) {
    const std::int64_t blocks = gridDim.x, block = blockIdx.x;
    first = static_cast<int>(count * block / blocks);
    last = static_cast<int>(count * (block + 1) / blocks);
  }
  /// visit(tile, piece, next piece)
  template <typename F>
  __device__ void each(F&& visit) const {
    if (first >= last) return;
    LowRankPiece piece = pieces[first], next = pieces[min(first + 1, last - 1)];
    for (int tile = first; tile < last; ++tile) {
      const LowRankPiece after = pieces[min(tile + 2, last - 1)];
      visit(tile, piece, next);
      piece = next, next = after;
    }
  }
  /// Whether a tile is the first, or the last, that uses its panel. A panel that does not fit serves one tile.
  __device__ bool starts(int tile, const LowRankPiece& at, const Matrix& t) const {
    return tile == first || (t.right ? at.column : at.row) == 0 || t.parts > C::kSlots;
  }
  __device__ bool ends(int tile, const LowRankPiece& at, const Matrix& t) const {
    return tile == last - 1 || (t.right ? at.column : at.row) + kTileSide >= t.side() || t.parts > C::kSlots;
  }
};

template <class C>
struct Barriers {
  std::uint64_t *panel_full, *panel_empty, *full, *empty;
  __device__ explicit Barriers(std::byte* memory) {
    panel_full = reinterpret_cast<std::uint64_t*>(memory + C::kBarriers);
    panel_empty = panel_full + C::kSlots;
    full = panel_empty + C::kSlots;
    empty = full + C::kStages;
  }
  __device__ void init() const {
    for (int i = 0; i < C::kSlots; ++i) barrier_init(&panel_full[i], 1), barrier_init(&panel_empty[i], 4 * kGroups);
    for (int i = 0; i < C::kStages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], 4 * kGroups);
    fence_barrier_init();
  }
};

template <class C>
__device__ void produce(const Walk<C>& walk, std::byte* memory, const Barriers<C>& at) {
  RingIndex<C::kSlots> slot;
  RingIndex<C::kStages> ring;
  slot.parity = ring.parity = 1;
  auto load = [](std::byte* to, const std::uint16_t* from, std::uint64_t* full, std::uint64_t* empty,
                 std::uint32_t parity) {
    barrier_wait(empty, parity);
    barrier_expect(full, kPanelPartBytes);
    bulk_load(to, from, kPanelPartBytes, full);
  };
  Matrix t;
  walk.each([&](int tile, const LowRankPiece& piece, const LowRankPiece&) {
    t.select(walk.matrices, piece.matrix, false);
    const int vector = t.right ? piece.row : piece.column, side = t.right ? piece.column : piece.row;
    const bool starts = walk.starts(tile, piece, t);
    for (int part = 0; part < t.parts; ++part, ring.advance()) {
      if (starts) {
        load(memory + slot.stage * kPanelPartBytes, panel_part(t.direction, t.rank, vector, part),
             &at.panel_full[slot.stage], &at.panel_empty[slot.stage], slot.parity);
        slot.advance();
      }
      load(memory + (C::kSlots + ring.stage) * kPanelPartBytes, panel_part(t.basis, t.rank, side, part),
           &at.full[ring.stage], &at.empty[ring.stage], ring.parity);
    }
  });
}

inline constexpr int kEights = 4;

/// A thread's elements of a tile: half h is row `row` + 8 h, its eight i the columns `column` + 32 i and the next
/// seven. The operand whose rows are columns of W lies permuted, so that the eight are neighbours.
struct Place {
  int row, column;
  __device__ explicit Place(const LowRankPiece& piece) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    row = piece.row + thread / 32 * 16 + lane / 4;
    column = piece.column + 8 * (lane % 4);
  }
  __device__ std::int64_t at(const Matrix& t, int h) const {
    return static_cast<std::int64_t>(row + 8 * h) * t.n + column;
  }
};

__device__ inline void copy16(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// What one thread takes of half a tile.
template <typename T>
struct Fetched {
  uint4 g[kEights][sizeof(T) / 2];
  uint4 high[kEights], low[kEights];

  __device__ Float8 gradient(int i) const {
    if constexpr (sizeof(T) == 2) {
      return unpack({g[i][0]});
    } else {
      const uint4 a = g[i][0], b = g[i][1];
      return {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
               __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
    }
  }
};

/// Halves of tiles of G, W and lower halves on their way, a ring of each warp's own.
template <class C, bool kGradient>
struct Fetcher {
  using T = typename C::Element;
  static constexpr int kWarpBytes = C::kFetchBytes / (4 * kGroups), kEightBytes = kWarpBytes / kEights;
  // Where W and the lower halves lie in an eight, behind 8 rows of 32 of G.
  static constexpr int kHigh = 8 * 32 * static_cast<int>(sizeof(T)), kLow = kHigh + 512;
  std::byte* ring;  // of this warp
  int lane, slot = 0;

  __device__ explicit Fetcher(std::byte* memory)
      : ring(memory + C::kFetched + static_cast<int>(threadIdx.x) / 32 * kWarpBytes * C::kAhead),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  /// Starts the fetch of half `h` of a tile into the slot that take() freed. Four neighbouring lanes copy 64 bytes of a
  /// row at a time. Outside W nothing is fetched.
  __device__ void start(const Matrix& t, const Place& p, int h) {
    const std::uint32_t to = shared_address(ring + slot * kWarpBytes);
    const int row = lane / 4, part = lane % 4, quad = p.column - 8 * part;  // first column of four lanes
    const std::int64_t at = p.at(t, h);
    const T* g = static_cast<const T*>(t.g) + at;
    if (p.row + 8 * h < t.m) {
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        const std::uint32_t eight = to + i * kEightBytes;
        if constexpr (kGradient && sizeof(T) == 4) {
          const T* quarter = g + 32 * i - 4 * part;
          if (quad + 32 * i + 4 * part < t.n) copy16(eight + row * 128 + (part ^ (row & 1)) * 16, quarter);
          if (quad + 32 * i + 4 * part + 16 < t.n)
            copy16(eight + row * 128 + ((part + 4) ^ (row & 1)) * 16, quarter + 16);
        }
        if (p.column + 32 * i < t.n) {
          if constexpr (kGradient && sizeof(T) == 2) copy16(eight + lane * 16, g + 32 * i);
          copy16(eight + kHigh + lane * 16, t.w + at + 32 * i);
          if (t.low != nullptr) copy16(eight + kLow + lane * 16, t.low + at + 32 * i);
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    slot = slot + 1 == C::kAhead ? 0 : slot + 1;
  }
  /// Waits for the oldest half, in the slot where the next start() writes.
  __device__ void take(Fetched<T>& x) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(C::kAhead - 1) : "memory");
    __syncwarp();
    const std::byte* from = ring + slot * kWarpBytes;
    const int row = lane / 4, chunk = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kEights; ++i, from += kEightBytes) {
      if constexpr (kGradient && sizeof(T) == 2) {
        x.g[i][0] = *reinterpret_cast<const uint4*>(from + lane * 16);
      } else if constexpr (kGradient) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          x.g[i][half] = *reinterpret_cast<const uint4*>(from + row * 128 + ((chunk + half) ^ (row & 1)) * 16);
      }
      x.high[i] = *reinterpret_cast<const uint4*>(from + kHigh + lane * 16);
      x.low[i] = *reinterpret_cast<const uint4*>(from + kLow + lane * 16);
    }
    __syncwarp();
  }
};

}  // namespace kiln::cuda::apply

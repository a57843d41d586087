#include <algorithm>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_panels.cuh"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

/// W <- keep (W - back A Q' - outside c phi clip G), A = N - inside c phi R: 12 bytes a parameter of device memory,
/// under which the products must hide.
///
/// A block walks along the tiles of the same 128 vectors: their panel of A stays in shared memory (128 KB at r = 512)
/// and Q streams past it, so that L2 gives 2 r / 128 bytes a parameter, half of what two streams would take. Two
/// warpgroups multiply 64 rows each. Their warps fetch G, W and its lower halves several pieces ahead, across tiles, so
/// that 48 to 96 KB a multiprocessor are in flight while the tensor cores work. The copies are asynchronous: loads to
/// registers would share the six scoreboards of a warp with the tables, and each wait for one wait for all.
///
/// At m n = 1.2e9 and r = 512: device memory 14.6 GB, 4.9 ms; L2 24 GB, 4.4 ms at 5.5 TB/s; products 2.1 ms.
namespace kiln::cuda {
namespace {

constexpr int kThreads = 384, kGroups = 2, kTileSide = 128;
constexpr int kPieces = 8;  // groups of eight elements that a thread has of a tile
constexpr int kPieceBytes = 64 * 128 * kGroups;

/// Shared memory: slots of the panel, stages of Q, pieces that are fetched ahead, 16 KB each.
template <int kSlotsValue, int kStagesValue, int kAheadValue>
struct Config {
  static constexpr int kSlots = kSlotsValue, kStages = kStagesValue, kAhead = kAheadValue;
  static constexpr int kFetched = (kSlots + kStages) * kPanelPartBytes;
  static constexpr int kBarriers = kFetched + kAhead * kPieceBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * (kSlots + kStages) * 8;
  static_assert(kPieceBytes == kPanelPartBytes && kSharedBytes <= 232448);
};
using Low = Config<4, 4, 6>;   // ranks up to 256
using High = Config<8, 3, 3>;  // a panel of a rank above 512 is loaded for every tile

struct Apply {
  double back, outside, beta1, beta2, weight_decay;
  std::uint64_t seed;
};

/// The tiles of one block: neighbours in the list.
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
  __device__ LowRankPiece piece(int tile) const { return pieces[min(tile, last - 1)]; }
  /// Whether a tile is the first, or the last, that uses its panel. A panel that does not fit serves one tile.
  __device__ bool starts(int tile, const LowRankPiece& at, bool right, int parts) const {
    return tile == first || (right ? at.column : at.row) == 0 || parts > C::kSlots;
  }
  __device__ bool ends(int tile, const LowRankPiece& at, bool right, int parts, int side) const {
    return tile == last - 1 || (right ? at.column : at.row) + kTileSide >= side || parts > C::kSlots;
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
    for (int i = 0; i < C::kSlots; ++i) {
      barrier_init(&panel_full[i], 1);
      barrier_init(&panel_empty[i], 4 * kGroups);
    }
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], 4 * kGroups);
    }
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
  for (int tile = walk.first; tile < walk.last; ++tile) {
    const LowRankPiece piece = walk.piece(tile);
    const LowRankMatrix& t = walk.matrices[piece.matrix];
    const int vector = t.right ? piece.row : piece.column, side = t.right ? piece.column : piece.row;
    const int parts = panel_parts(t.rank);
    const bool starts = walk.starts(tile, piece, t.right, parts);
    for (int part = 0; part < parts; ++part, ring.advance()) {
      if (starts) {
        load(memory + slot.stage * kPanelPartBytes, panel_part(t.direction, t.rank, vector, part),
             &at.panel_full[slot.stage], &at.panel_empty[slot.stage], slot.parity);
        slot.advance();
      }
      load(memory + (C::kSlots + ring.stage) * kPanelPartBytes, panel_part(t.basis, t.rank, side, part),
           &at.full[ring.stage], &at.empty[ring.stage], ring.parity);
    }
  }
}

/// A thread's elements of a tile: piece i is row `row` + 8 (i % 2), columns `column` + 32 (i / 2) and the next seven.
/// What the matrix's table entry says is copied: it would be read again after every store.
struct Place {
  std::uint16_t *w, *low;
  const float *g, *phi, *factor;
  std::uint64_t stream;
  int m, n, row, column;
  bool right, decay;

  /// The operand whose rows are columns of W lies permuted: the eight are neighbours.
  __device__ Place(const LowRankMatrix& t, const LowRankPiece& piece)
      : w(t.w),
        low(t.low),
        g(t.g),
        phi(t.phi),
        factor(t.factor),
        stream(t.stream),
        m(t.m),
        n(t.n),
        right(t.right),
        decay(t.decay) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    row = piece.row + thread / 32 * 16 + lane / 4;
    column = piece.column + 8 * (lane % 4);
  }
  __device__ int row_of(int i) const { return row + 8 * (i % 2); }
  __device__ int column_of(int i) const { return column + 32 * (i / 2); }
  __device__ bool inside(int i) const { return row_of(i) < m && column_of(i) < n; }
  __device__ std::int64_t at(int i) const { return static_cast<std::int64_t>(row_of(i)) * n + column_of(i); }
};

__device__ void copy16(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// Pieces of G, W and lower halves on their way, a ring of each warp's own: 8 rows of 32 columns.
template <class C, bool kGradient>
struct Fetcher {
  static constexpr int kWarpBytes = kPieceBytes / (4 * kGroups), kHigh = 1024, kLow = 1536;
  std::byte* ring;  // of this warp
  int lane, slot = 0;

  __device__ explicit Fetcher(std::byte* memory)
      : ring(memory + C::kFetched + static_cast<int>(threadIdx.x) / 32 * kWarpBytes * C::kAhead),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  /// Starts the fetch of piece i of a tile into the slot that take() freed. Four neighbouring lanes copy 64 bytes of a
  /// row at a time. Outside W nothing is fetched.
  __device__ void start(const Place& p, int i) const {
    const std::uint32_t to = shared_address(ring + slot * kWarpBytes);
    const int row = lane / 4, part = lane % 4;
    if (p.row_of(i) < p.m) {
      if constexpr (kGradient) {
        const std::int64_t first = p.at(i) - 8 * part;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int chunk = 4 * half + part;
          if (p.column_of(i) - 8 * part + 4 * chunk < p.n)
            copy16(to + row * 128 + (chunk ^ (row & 1)) * 16, p.g + first + 4 * chunk);
        }
      }
      if (p.column_of(i) < p.n) {
        copy16(to + kHigh + lane * 16, p.w + p.at(i));
        if (p.low != nullptr) copy16(to + kLow + lane * 16, p.low + p.at(i));
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  /// Waits for the oldest piece: eight elements of G, of W and lower halves.
  __device__ void take(float4 (&g)[2], uint4& high, uint4& low) {
    asm volatile("cp.async.wait_group %0;" ::"n"(C::kAhead - 1) : "memory");
    __syncwarp();
    const std::byte* from = ring + slot * kWarpBytes;
    const int row = lane / 4, chunk = lane % 4 * 2;
    if constexpr (kGradient) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        g[half] = *reinterpret_cast<const float4*>(from + row * 128 + ((chunk + half) ^ (row & 1)) * 16);
    }
    high = *reinterpret_cast<const uint4*>(from + kHigh + lane * 16);
    low = *reinterpret_cast<const uint4*>(from + kLow + lane * 16);
    __syncwarp();
  }
  __device__ void advance() { slot = slot + 1 == C::kAhead ? 0 : slot + 1; }
};

/// Factors of a matrix at this step.
struct Factors {
  float back, outside, keep;
};

template <bool kGradient>
__device__ void update(const Place& place, int i, const float4 (&g)[2], uint4 high, uint4 low, const float (&sums)[64],
                       const Factors& f, std::uint64_t seed) {
  if (!place.inside(i)) return;
  Master8 w(high, place.low == nullptr ? make_uint4(0, 0, 0, 0) : low);
  Float8 scale{};
  if constexpr (kGradient) {
    if (place.right) {
      const float phi = f.outside * __ldg(place.phi + place.row_of(i));
#pragma unroll
      for (int j = 0; j < 8; ++j) scale.v[j] = phi;
    } else {
      const float4* phi = reinterpret_cast<const float4*>(place.phi + place.column_of(i));
      const float4 a = __ldg(phi), b = __ldg(phi + 1);
      scale = {{f.outside * a.x, f.outside * a.y, f.outside * a.z, f.outside * a.w, f.outside * b.x, f.outside * b.y,
                f.outside * b.z, f.outside * b.w}};
    }
  }
  const float parts[8] = {g[0].x, g[0].y, g[0].z, g[0].w, g[1].x, g[1].y, g[1].z, g[1].w};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float change = f.back * sums[(i / 2 * 4 + j / 2) * 4 + i % 2 * 2 + j % 2];
    if constexpr (kGradient) change += scale.v[j] * parts[j];
    w.value.v[j] = f.keep * (w.value.v[j] - change);
  }
  w.store(place.w, place.low, place.at(i), seed, place.stream);
}

/// Sums of one tile. `panel` is the ring's position of the panel's first part; its slots are given back part by part
/// where the next tile has other vectors.
template <class C>
__device__ void sum_tile(bool right, int parts, bool starts, bool ends, RingIndex<C::kSlots>& slot,
                         RingIndex<C::kSlots> panel, RingIndex<C::kStages>& ring, std::byte* memory,
                         const Barriers<C>& at, int group, int lane, float (&sums)[64]) {
  int previous = -1, previous_slot = -1;
  auto release = [&] {
    if (lane != 0) return;
    barrier_arrive(&at.empty[previous]);
    if (ends) barrier_arrive(&at.panel_empty[previous_slot]);
  };
  for (int part = 0; part < parts; ++part) {
    if (starts) {
      barrier_wait(&at.panel_full[slot.stage], slot.parity);
      slot.advance();
    }
    barrier_wait(&at.full[ring.stage], ring.parity);
    const std::uint32_t vectors = shared_address(memory + panel.stage * kPanelPartBytes),
                        side = shared_address(memory + (C::kSlots + ring.stage) * kPanelPartBytes);
    const std::uint32_t a = (right ? vectors : side) + group * (kPanelPartBytes / kGroups), b = right ? side : vectors;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kPanelColumns / 16; ++k)
      wgmma<kTileSide>(sums, operand_descriptor<128>(a + 32 * k), operand_descriptor<128>(b + 32 * k),
                       part > 0 || k > 0);
    wgmma_commit();
    if (previous >= 0) {
      wgmma_wait<1>();
      release();
    }
    previous = ring.stage;
    previous_slot = panel.stage;
    ring.advance();
    panel.advance();
  }
  wgmma_wait<0>();
  release();
  fence_registers(sums);
}

template <class C, bool kGradient>
__device__ void consume(const Walk<C>& walk, std::byte* memory, const Barriers<C>& at, const double* scalars,
                        const Apply& c) {
  const int group = static_cast<int>(threadIdx.x) / 128, lane = static_cast<int>(threadIdx.x) % 32;
  const double step = scalars[static_cast<int>(Scalar::step)], lr = scalars[static_cast<int>(Scalar::lr)];
  const double rate = lr * sqrt(1.0 - pow(c.beta2, step)) / (1.0 - pow(c.beta1, step));
  const float back = static_cast<float>(rate * c.back), keep = static_cast<float>(1.0 - lr * c.weight_decay),
              outside = static_cast<float>(rate * c.outside * scalars[static_cast<int>(Scalar::clip_scale)]);
  const std::uint64_t seed = rounding_seed(c.seed, step);
  RingIndex<C::kSlots> slot, panel;
  RingIndex<C::kStages> ring;
  if (walk.first >= walk.last) return;
  LowRankPiece piece = walk.piece(walk.first), next_piece = walk.piece(walk.first + 1);
  Place place(walk.matrices[piece.matrix], piece);
  Fetcher<C, kGradient> fetcher(memory);
#pragma unroll
  for (int i = 0; i < C::kAhead; ++i, fetcher.advance()) fetcher.start(place, i);
  float sums[64];
  for (int tile = walk.first; tile < walk.last; ++tile) {
    const LowRankPiece after_next = walk.piece(tile + 2);  // asked for a tile before it is used
    const Place next(walk.matrices[next_piece.matrix], next_piece);
    const Factors factors{back, kGradient ? outside * __ldg(place.factor) : 0.0f, place.decay ? keep : 1.0f};
    const int parts = panel_parts(walk.matrices[piece.matrix].rank);
    const bool starts = walk.starts(tile, piece, place.right, parts),
               ends = walk.ends(tile, piece, place.right, parts, place.right ? place.n : place.m);
    if (starts) panel = slot;
    sum_tile(place.right, parts, starts, ends, slot, panel, ring, memory, at, group, lane, sums);
#pragma unroll
    for (int i = 0; i < kPieces; ++i, fetcher.advance()) {
      float4 g[2] = {};
      uint4 high, low;
      fetcher.take(g, high, low);
      if (i + C::kAhead < kPieces)
        fetcher.start(place, i + C::kAhead);
      else
        fetcher.start(next, i + C::kAhead - kPieces);
      update<kGradient>(place, i, g, high, low, sums, factors, seed);
    }
    place = next;
    piece = next_piece;
    next_piece = after_next;
  }
}

template <class C, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1)
    apply_all(const LowRankMatrix* matrices, const LowRankPiece* pieces, int count, const double* scalars, Apply c) {
  extern __shared__ __align__(1024) std::byte memory[];
  if (skipped(scalars)) return;
  const Barriers<C> at(memory);
  if (threadIdx.x == 0) at.init();
  __syncthreads();
  const Walk<C> walk(matrices, pieces, count);
  if (threadIdx.x >= 128 * kGroups) {
    registers_decrease<24>();
    if (threadIdx.x == 128 * kGroups) produce(walk, memory, at);
  } else {
    registers_increase<240>();
    consume<C, kGradient>(walk, memory, at, scalars, c);
  }
}

template <class C, bool kGradient>
void launch_apply(const LowRankTable& table) {
  static const bool allowed [[maybe_unused]] = [] {
    check_cuda(
        cudaFuncSetAttribute(apply_all<C, kGradient>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
        "cudaFuncSetAttribute");
    return true;
  }();
  const LowRankStep& s = table.step;
  const Apply c{.back = s.back,
                .outside = s.outside,
                .beta1 = s.beta1,
                .beta2 = s.beta2,
                .weight_decay = s.weight_decay,
                .seed = s.seed};
  launch({"low_rank_apply", static_cast<unsigned>(std::min(table.count, table.multiprocessors)), kThreads, table.stream,
          C::kSharedBytes},
         apply_all<C, kGradient>, table.matrices, table.pieces, table.count, table.scalars, c);
}

}  // namespace

void low_rank_apply(const LowRankTable& table) {
  const bool low = panel_parts(table.rank) <= Low::kSlots;
  if (table.step.residual)
    low ? launch_apply<Low, true>(table) : launch_apply<High, true>(table);
  else
    low ? launch_apply<Low, false>(table) : launch_apply<High, false>(table);
}

}  // namespace kiln::cuda

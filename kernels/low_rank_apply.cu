#include <algorithm>

#include "kernels/gemm_hopper_ptx.cuh"
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
/// warpgroups take turns at whole tiles: one multiplies while the other updates weights. G, W and its lower halves come
/// in slices of 32 columns, up to a tile ahead, through the copy engine too: loads of the warps' own would queue before
/// their stores and reads of shared memory.
///
/// At m n = 1.2e9 and r = 512: device memory 14.6 GB, 4.9 ms; L2 24 GB, 4.4 ms at 5.5 TB/s; products 2.1 ms.
namespace kiln::cuda {
namespace {

constexpr int kThreads = 384, kGroups = 2, kTileSide = 128;
constexpr int kSlices = kTileSide / kBoxColumns, kSliceElements = kTileSide * kBoxColumns;
constexpr int kHigh = 4 * kSliceElements, kLow = kHigh + 2 * kSliceElements, kSliceBytes = kLow + 2 * kSliceElements;

/// Shared memory: slots of the panel and stages of Q, 16 KB each; slices of tiles, 32 KB each.
template <int kSlotsValue, int kStagesValue, int kAheadValue>
struct Config {
  static constexpr int kSlots = kSlotsValue, kStages = kStagesValue, kAhead = kAheadValue;
  static constexpr int kFetched = (kSlots + kStages) * kPanelPartBytes;
  static constexpr int kBarriers = kFetched + kAhead * kSliceBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * (kSlots + kStages + kAhead) * 8;
  static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");
};
using Low = Config<4, 2, 4>;   // ranks up to 256
using High = Config<8, 2, 2>;  // a panel of a rank above 512 is loaded for every tile

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
struct Barriers {  // stages are given back by the warps of one warpgroup
  std::uint64_t *panel_full, *panel_empty, *full, *empty, *slice_full, *slice_empty;
  __device__ explicit Barriers(std::byte* memory) {
    panel_full = reinterpret_cast<std::uint64_t*>(memory + C::kBarriers);
    panel_empty = panel_full + C::kSlots;
    full = panel_empty + C::kSlots;
    empty = full + C::kStages;
    slice_full = empty + C::kStages;
    slice_empty = slice_full + C::kAhead;
  }
  __device__ void init() const {
    for (int i = 0; i < C::kSlots; ++i) {
      barrier_init(&panel_full[i], 1);
      barrier_init(&panel_empty[i], 4);
    }
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], 4);
    }
    for (int i = 0; i < C::kAhead; ++i) {
      barrier_init(&slice_full[i], 1);
      barrier_init(&slice_empty[i], 4);
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

/// Slices of tiles of G, W and the lower halves.
template <class C, bool kGradient>
__device__ void produce_slices(const Walk<C>& walk, std::byte* memory, const Barriers<C>& at) {
  RingIndex<C::kAhead> ring;
  ring.parity = 1;
  for (int tile = walk.first; tile < walk.last; ++tile) {
    const LowRankPiece piece = walk.piece(tile);
    const LowRankMatrix& t = walk.matrices[piece.matrix];
    const bool low = t.low != nullptr, right = t.right;
    for (int slice = 0; slice < kSlices; ++slice, ring.advance()) {
      std::byte* to = memory + C::kFetched + ring.stage * kSliceBytes;
      std::uint64_t* full = &at.slice_full[ring.stage];
      const int column = piece.column + slice * kBoxColumns;
      barrier_wait(&at.slice_empty[ring.stage], ring.parity);
      barrier_expect(full, (kGradient ? kHigh : 0) + (kLow - kHigh) * (low ? 2 : 1));
      if (kGradient) {
        tensor_load(to, &t.gradient, full, 2 * column, piece.row, 0);
        if (!right) tensor_load(to + kHigh / 2, &t.gradient, full, 2 * column, piece.row + kBoxRowsLeft, 0);
      }
      tensor_load(to + kHigh, &t.weights, full, column, piece.row, 0);
      if (low) tensor_load(to + kLow, &t.lower, full, column, piece.row, 0);
    }
  }
}

/// A thread's elements of a tile: in slice i, columns `column` + 32 i and the next seven of rows `row` + 8 h + 64 f, h
/// and f 0 or 1. What the matrix's table entry says is copied: it would be read again after every store.
struct Place {
  std::uint16_t *w, *low;
  const float *phi, *factor;
  std::uint64_t stream;
  int m, n, row, column, parts;
  bool right, decay;

  /// The operand whose rows are columns of W lies permuted: the eight are neighbours.
  __device__ Place(const LowRankMatrix& t, const LowRankPiece& piece)
      : w(t.w),
        low(t.low),
        phi(t.phi),
        factor(t.factor),
        stream(t.stream),
        m(t.m),
        n(t.n),
        parts(panel_parts(t.rank)),
        right(t.right),
        decay(t.decay) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
    row = piece.row + thread / 32 * 16 + lane / 4;
    column = piece.column + 8 * (lane % 4);
  }
};

/// A thread's part of half a slice: two rows of eight elements.
struct Slice {
  float4 g[2][2];
  uint4 high[2], low[2];

  /// `memory` holds a slice as the copy engine leaves it: chunks of 16 bytes are exchanged by the row.
  template <bool kGradient>
  __device__ void read(const std::byte* memory, int f) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, q = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = thread / 32 * 16 + lane / 4 + 8 * h + 64 * f;
      if constexpr (kGradient) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          g[h][i] = *reinterpret_cast<const float4*>(memory + row * 128 + ((2 * q + i) ^ (row & 7)) * 16);
      }
      const int at = row * 64 + (q ^ (row >> 1 & 3)) * 16;
      high[h] = *reinterpret_cast<const uint4*>(memory + kHigh + at);
      low[h] = *reinterpret_cast<const uint4*>(memory + kLow + at);
    }
  }
};

/// Factors of a matrix at this step.
struct Factors {
  float back, outside, keep;
};

__device__ Float8 scaled(float factor, const float* from) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from) + 1);
  return {
      {factor * a.x, factor * a.y, factor * a.z, factor * a.w, factor * b.x, factor * b.y, factor * b.z, factor * b.w}};
}

template <bool kGradient>
__device__ void update(const Place& place, int i, int half, const Slice& x, const float (&sums)[64], const Factors& f,
                       std::uint64_t seed) {
  const int column = place.column + 32 * i;
  if (column >= place.n) return;
  Float8 across;
  if (kGradient && !place.right) across = scaled(f.outside, place.phi + column);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = place.row + 8 * h + 64 * half;
    if (row >= place.m) continue;
    Master8 w(x.high[h], place.low == nullptr ? make_uint4(0, 0, 0, 0) : x.low[h]);
    const float4 g0 = x.g[h][0], g1 = x.g[h][1];
    const float g[8] = {g0.x, g0.y, g0.z, g0.w, g1.x, g1.y, g1.z, g1.w};
    const float down = kGradient && place.right ? f.outside * __ldg(place.phi + row) : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float change = f.back * sums[(i * 4 + j / 2) * 4 + h * 2 + j % 2];
      if constexpr (kGradient) change += (place.right ? down : across.v[j]) * g[j];
      w.value.v[j] = f.keep * (w.value.v[j] - change);
    }
    w.store(place.w, place.low, static_cast<std::int64_t>(row) * place.n + column, seed, place.stream);
  }
}

/// Sums of one tile. The panel's slots are given back part by part at the last tile that uses them.
template <class C>
__device__ void sum_tile(bool right, int parts, bool ends, RingIndex<C::kSlots> panel, RingIndex<C::kStages>& ring,
                         std::byte* memory, const Barriers<C>& at, int lane, float (&sums)[2][64]) {
  int previous = -1, previous_slot = -1;
  auto release = [&] {
    if (lane != 0) return;
    barrier_arrive(&at.empty[previous]);
    if (ends) barrier_arrive(&at.panel_empty[previous_slot]);
  };
  for (int part = 0; part < parts; ++part) {
    barrier_wait(&at.panel_full[panel.stage], panel.parity);
    barrier_wait(&at.full[ring.stage], ring.parity);
    const std::uint32_t vectors = shared_address(memory + panel.stage * kPanelPartBytes),
                        side = shared_address(memory + (C::kSlots + ring.stage) * kPanelPartBytes);
    const std::uint32_t a = right ? vectors : side, b = right ? side : vectors;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kPanelColumns / 16; ++k)
#pragma unroll
      for (int f = 0; f < 2; ++f)
        wgmma<kTileSide>(sums[f], operand_descriptor<128>(a + f * (kPanelPartBytes / 2) + 32 * k),
                         operand_descriptor<128>(b + 32 * k), part > 0 || k > 0);
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
  fence_registers(sums[0]);
  fence_registers(sums[1]);
}

template <int kStages>
__device__ void skip(RingIndex<kStages>& ring, int count) {
  const int at = ring.stage + count;
  ring.parity ^= at / kStages & 1;
  ring.stage = at % kStages;
}

/// Tiles of one warpgroup: every other one. Both follow the rings past all tiles. The products of a tile start when
/// those of the one before are over, named barrier 1 + group: a panel is given back after its last tile.
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
  RingIndex<C::kAhead> slices;
  float sums[2][64];
  if (group == 1) gemm::named_barrier_arrive(1, 128 * kGroups);
  for (int tile = walk.first; tile < walk.last; ++tile) {
    const LowRankPiece piece = walk.piece(tile);
    const Place place(walk.matrices[piece.matrix], piece);
    const bool starts = walk.starts(tile, piece, place.right, place.parts),
               ends = walk.ends(tile, piece, place.right, place.parts, place.right ? place.n : place.m);
    if (starts) {
      panel = slot;
      skip(slot, place.parts);
    }
    if ((tile - walk.first) % kGroups != group) {
      skip(ring, place.parts);
      skip(slices, kSlices);
      continue;
    }
    const Factors factors{back, kGradient ? outside * __ldg(place.factor) : 0.0f, place.decay ? keep : 1.0f};
    named_barrier(1 + group, 128 * kGroups);
    sum_tile(place.right, place.parts, ends, panel, ring, memory, at, lane, sums);
    gemm::named_barrier_arrive(2 - group, 128 * kGroups);
#pragma unroll
    for (int i = 0; i < kSlices; ++i, slices.advance()) {
      const std::byte* from = memory + C::kFetched + slices.stage * kSliceBytes;
      barrier_wait(&at.slice_full[slices.stage], slices.parity);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        Slice slice = {};
        slice.read<kGradient>(from, f);
        if (f == 1) {
          __syncwarp();
          if (lane == 0) barrier_arrive(&at.slice_empty[slices.stage]);
        }
        update<kGradient>(place, i, f, slice, sums[f], factors, seed);
      }
    }
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
    registers_decrease<40>();
    if (threadIdx.x == 128 * kGroups) produce(walk, memory, at);
    if (threadIdx.x == 128 * kGroups + 32) produce_slices<C, kGradient>(walk, memory, at);
  } else {
    registers_increase<232>();
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

#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/low_rank_apply.cuh"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

/// W <- keep (W - back A Q' - outside c phi clip G), A = N - inside c phi R: 12 bytes a parameter of device memory,
/// under which the products must hide; 10 where G is bf16.
///
/// A block walks along the tiles of the same 128 vectors: their panel of A stays in shared memory (128 KB at r = 512)
/// and Q streams past it, so that L2 gives 2 r / 128 bytes a parameter, half of what two streams would take. Two
/// warpgroups multiply 64 rows each. Their warps fetch G, W and its lower halves half a tile or more ahead, so that 64
/// KB or 128 KB a multiprocessor are in flight while the tensor cores work: asynchronous copies of their own, since
/// those of the copy engine are served in turn and Q would wait behind them. With two warps a scheduler latency counts
/// as much as traffic: a thread works on 32 elements at a time, and nothing in the loop reads tables.
///
/// At m n = 1.2e9 and r = 512: device memory 14.6 GB, 4.9 ms; L2 24 GB, 4.4 ms at 5.5 TB/s; products 2.1 ms.
namespace kiln::cuda {
namespace {

using namespace apply;

struct Apply {
  double back, outside, beta1, beta2, weight_decay;
  std::uint64_t seed;
};

/// c phi outside of a tile's vectors, fetched before they are needed. Rows: the thread's two. Columns: those at
/// lane + 32 i, which the warp exchanges.
struct Scale {
  float v[4];
  __device__ Scale(const Matrix& t, const LowRankPiece& piece, float factor) {
    const Place place(piece);
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = factor * (t.right ? t.phi[min(place.row + 8 * (i % 2), t.m - 1)]
                               : t.phi[min(piece.column + lane + 32 * i, t.n - 1)]);
  }
  /// Of half h, eight i.
  __device__ Float8 of(bool right, int h, int i) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Float8 out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float across = __shfl_sync(0xffffffffu, v[i], lane % 4 * 8 + j);
      out.v[j] = right ? v[h] : across;
    }
    return out;
  }
};

/// The same for all elements of a matrix at this step.
struct Factors {
  float back, keep;
  std::uint64_t seed;
};

/// Half a tile.
template <bool kGradient, typename T>
__device__ void update(const Matrix& t, const Place& place, int h, const Fetched<T>& x, const float (&sums)[64],
                       const Scale& scale, const Factors& factors) {
  const std::int64_t at = place.at(t, h);
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    Master8 w(x.high[i], t.low == nullptr ? make_uint4(0, 0, 0, 0) : x.low[i]);
    Float8 of_vector{};
    if constexpr (kGradient) of_vector = scale.of(t.right, h, i);
    const Float8 g = x.gradient(i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float change = factors.back * sums[(i * 4 + j / 2) * 4 + h * 2 + j % 2];
      if constexpr (kGradient) change += of_vector.v[j] * g.v[j];
      w.value.v[j] = factors.keep * (w.value.v[j] - change);
    }
    if (place.row + 8 * h < t.m && place.column + 32 * i < t.n)
      w.store(t.w, t.low, at + 32 * i, factors.seed, t.stream);
  }
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
  const float back = static_cast<float>(rate * c.back), keep = static_cast<float>(1.0 - lr * c.weight_decay);
  const float outside =
      kGradient ? static_cast<float>(rate * c.outside * scalars[static_cast<int>(Scalar::clip_scale)]) : 0.0f;
  const std::uint64_t seed = rounding_seed(c.seed, step);
  RingIndex<C::kSlots> slot, panel;
  RingIndex<C::kStages> ring;
  Matrix t, next;
  Fetcher<C, kGradient> fetcher(memory);
  float sums[64];
  walk.each([&](int tile, const LowRankPiece& piece, const LowRankPiece& next_piece) {
    const Place place(piece), next_place(next_piece);
    if (tile == walk.first) {
      t.select(walk.matrices, piece.matrix, kGradient);
#pragma unroll
      for (int h = 0; h < C::kAhead; ++h) fetcher.start(t, place, h);
    } else if (t.index != piece.matrix) {
      t = next;
    }
    next.select(walk.matrices, next_piece.matrix, kGradient);
    const Scale scale(t, piece, outside * t.factor);
    const Factors factors{back, t.decay ? keep : 1.0f, seed};
    const bool starts = walk.starts(tile, piece, t);
    if (starts) panel = slot;
    sum_tile(t.right, t.parts, starts, walk.ends(tile, piece, t), slot, panel, ring, memory, at, group, lane, sums);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Fetched<typename C::Element> fetched = {};
      fetcher.take(fetched);
      if (h + C::kAhead < 2)
        fetcher.start(t, place, h + C::kAhead);
      else
        fetcher.start(next, next_place, h + C::kAhead - 2);
      update<kGradient>(t, place, h, fetched, sums, scale, factors);
    }
  });
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
  const bool low = panel_parts(table.rank) <= Low<bf16>::kSlots;
  if (!table.step.residual)  // G is not read
    low ? launch_apply<Low<bf16>, false>(table) : launch_apply<High<bf16>, false>(table);
  else if (table.half_gradient)
    low ? launch_apply<Low<bf16>, true>(table) : launch_apply<High<bf16>, true>(table);
  else
    low ? launch_apply<Low<float>, true>(table) : launch_apply<High<float>, true>(table);
}

}  // namespace kiln::cuda

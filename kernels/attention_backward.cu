#include <cmath>

#include "kernels/attention.h"
#include "kernels/attention_tile.cuh"

namespace kiln::cuda {
namespace {

/// Per query row, for the kernel of dk and dv: [B,H,Tpad] each, Tpad = T rounded up to 64. A row past the sequence has
/// lse +inf and delta 0, so that its probabilities are 0.
struct RowStatistics {
  float* lse;    // in base 2
  float* delta;  // sum_d do o
  int padded_tokens;

  __device__ std::int64_t at(const Schedule& s, int sequence, int head, int row) const {
    return (static_cast<std::int64_t>(sequence) * s.heads + head) * padded_tokens + row;
  }
};

/// The inverse rotation of RoPE on an accumulator [64, kD] whose thread holds rows row and row + 8: columns i and i +
/// D/2 turn by minus the angle of the row. All loads go out before the first is used; a row past the sequence, which is
/// never stored, takes the last row's angles.
template <int kD>
__device__ void rotate_back(float (&d)[kD / 2], const float* rope, int row, int tokens) {
  float2 cosine[2][kD / 16], sine[2][kD / 16];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* angles = rope + static_cast<std::int64_t>(min(row + 8 * h, tokens - 1)) * kD + threadIdx.x % 4 * 2;
#pragma unroll
    for (int t = 0; t < kD / 16; ++t) {
      cosine[h][t] = __ldg(reinterpret_cast<const float2*>(angles + 8 * t));
      sine[h][t] = __ldg(reinterpret_cast<const float2*>(angles + 8 * t + kD / 2));
    }
  }
#pragma unroll
  for (int i = 0; i < kD / 4; ++i) {
    const int h = i / 2 % 2, t = i / 4;
    const float c = i % 2 == 0 ? cosine[h][t].x : cosine[h][t].y, s = i % 2 == 0 ? sine[h][t].x : sine[h][t].y;
    const float low = d[i], high = d[i + kD / 4];
    d[i] = low * c + high * s;
    d[i + kD / 4] = high * c - low * s;
  }
}

/// Also tells the compiler that the old values are dead, which a wgmma that overwrites them does not.
template <int kCount>
__device__ void clear(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = 0.f;
}

template <int kCount>
__device__ void scale_all(float (&d)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] *= factor;
}

// --- dq: a warpgroup owns 64 queries and streams keys and values ----------------------------------------------------

template <int kHeadDim, int kConsumers, int kRingStages, int kResidentSlots, bool kDrainEachTile>
struct QueryConfig {
  static constexpr bool kDrain = kDrainEachTile;  // no product outlives its tile: saves 16 registers
  static constexpr int kD = kHeadDim, kWarpgroups = kConsumers, kStages = kRingStages, kSlots = kResidentSlots;
  using Role = Roles<kWarpgroups>;
  using Rows = Tile<kD, kRows>;

  struct Shared {
    alignas(1024) std::uint8_t k[kStages][Rows::kBytes];
    alignas(1024) std::uint8_t v[kStages][Rows::kBytes];
    alignas(1024) std::uint8_t q[kWarpgroups][kSlots][Rows::kBytes];
    alignas(1024) std::uint8_t dout[kWarpgroups][kSlots][Rows::kBytes];
    alignas(1024) std::uint8_t o[kWarpgroups][kSlots][Rows::kBytes];  // later the tile of dq
    std::uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    std::uint64_t full[kWarpgroups][kSlots], empty[kWarpgroups][kSlots];
  };
};

struct QueryMaps {
  CUtensorMap qkv, o, dout, dqkv;
};

template <int kWarpgroups>
__device__ int owned_row(const WorkItem& work, int warpgroup, int n) {
  return (work.tile * kWarpgroups + (warpgroup + n) % kWarpgroups) * kRows;
}

template <typename C>
__device__ void produce_keys(typename C::Shared& shared, const QueryMaps& maps, const Schedule& s) {
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slots[C::kWarpgroups];
  for (int n = 0; n * static_cast<int>(gridDim.x) < s.items; ++n) {
    const int item = scheduled_item(n);
    if (item >= s.items) continue;
    const WorkItem work = work_item(s, item);
    const int key_column = (s.heads + s.by_group(work.head)) * C::kD, value_column = key_column + s.kv_heads * C::kD;
#pragma unroll
    for (int w = 0; w < C::kWarpgroups; ++w) {
      const int row = owned_row<C::kWarpgroups>(work, w, n), slot = slots[w].stage, column = work.head * C::kD;
      if (row >= s.tokens) continue;
      std::uint64_t* full = &shared.full[w][slot];
      barrier_wait(&shared.empty[w][slot], slots[w].parity ^ 1);
      barrier_expect(full, 3 * C::Rows::kBytes);
      C::Rows::load(shared.dout[w][slot], &maps.dout, full, column, row, work.sequence);
      C::Rows::load(shared.o[w][slot], &maps.o, full, column, row, work.sequence);
      C::Rows::load(shared.q[w][slot], &maps.qkv, full, column, row, work.sequence);
      slots[w].advance();
    }
    const int tiles = (min(s.tokens, (work.tile + 1) * C::kWarpgroups * kRows) - 1) / kRows + 1;
    for (int j = 0; j < tiles; ++j, ring.advance()) {
      barrier_wait(&shared.k_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.k_full[ring.stage], C::Rows::kBytes);
      C::Rows::load(shared.k[ring.stage], &maps.qkv, &shared.k_full[ring.stage], key_column, j * kRows, work.sequence);
      barrier_wait(&shared.v_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.v_full[ring.stage], C::Rows::kBytes);
      C::Rows::load(shared.v[ring.stage], &maps.qkv, &shared.v_full[ring.stage], value_column, j * kRows,
                    work.sequence);
    }
  }
}

template <typename C>
struct QueryConsumer {
  typename C::Shared& shared;
  const int lane, warp, warpgroup;
  const float scale;  // 1 / sqrt(D)
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slot;
  int unreleased = -1;

  float s[kRows / 2], dp[kRows / 2], dq[C::kD / 2];
  std::uint32_t ds[kRows / 16][4];
  float lse[2], delta[2];

  __device__ void release(std::uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  }

  /// d = A B^T over the head dimension, A this warpgroup's rows.
  __device__ void issue_product(float (&d)[kRows / 2], std::uint32_t rows, std::uint32_t columns) {
    fence_registers(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step)
      wgmma<kRows>(d, C::Rows::by_column(rows, step), C::Rows::by_column(columns, step), step > 0);
    wgmma_commit();
  }

  /// Issued before the block's tiles are waited for: the loads are strided and slow.
  __device__ void load_lse(const Schedule& schedule, const WorkItem& work, int row0, const float* lse_in) {
    const int row = row0 + warp * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int64_t at = static_cast<std::int64_t>(work.sequence) * schedule.tokens + row + 8 * h;
      lse[h] = row + 8 * h < schedule.tokens ? lse_in[at * schedule.heads + work.head] * kLog2e : INFINITY;
    }
  }

  /// delta = rowsum(do o), and both statistics to memory for the other kernel.
  __device__ void statistics(const Schedule& schedule, const WorkItem& work, int row0, const RowStatistics& out) {
    delta[0] = delta[1] = 0.f;
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step) {
      std::uint32_t a[4], b[4];
      load_fragment<C::kD>(a, shared.dout[warpgroup][slot.stage], step);
      load_fragment<C::kD>(b, shared.o[warpgroup][slot.stage], step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a0 = __uint_as_float(a[i] << 16), a1 = __uint_as_float(a[i] & 0xffff0000u);
        const float b0 = __uint_as_float(b[i] << 16), b1 = __uint_as_float(b[i] & 0xffff0000u);
        delta[i % 2] += a0 * b0 + a1 * b1;
      }
    }
    const int row = row0 + warp * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      delta[h] = quad_sum(delta[h]);
      if (lane % 4 == 0) {
        out.lse[out.at(schedule, work.sequence, work.head, row + 8 * h)] = lse[h];
        out.delta[out.at(schedule, work.sequence, work.head, row + 8 * h)] = delta[h];
      }
    }
  }

  /// Of the diagonal tile, keys beyond the rows get no weight.
  __device__ void mask() {
    const int row = warp * 16 + lane / 4, key = lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kRows / 8; ++t) {
      if (8 * t + 7 <= warp * 16) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * t + key + i % 2 > row + i / 2 * 8) s[4 * t + i] = 0.f;
    }
  }

  __device__ void gradient(int last) {
    const std::uint32_t queries = shared_address(shared.q[warpgroup][slot.stage]);
    const std::uint32_t douts = shared_address(shared.dout[warpgroup][slot.stage]);
    const float scale2 = scale * kLog2e;
    int previous = 0;
    for (int j = 0; j <= last; ++j) {
      const std::uint32_t keys = shared_address(shared.k[ring.stage]);
      barrier_wait(&shared.k_full[ring.stage], ring.parity);
      issue_product(s, queries, keys);
      barrier_wait(&shared.v_full[ring.stage], ring.parity);
      issue_product(dp, douts, shared_address(shared.v[ring.stage]));
      wgmma_wait<1>();  // also the dq of the tile before
      fence_registers(s);
      fence_registers(ds);
      if (!C::kDrain && j > 0) release(&shared.k_empty[previous]);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) s[i] = exp2_approx(fmaf(s[i], scale2, -lse[i / 2 % 2]));
      if (j == last) mask();
      fence_registers(s);  // or the compiler waits for dp first
      wgmma_wait<0>();
      fence_registers(dp);
      release(&shared.v_empty[ring.stage]);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
      pack_operand<kRows / 2>(ds, s);
      fence_registers(dq);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step)
        wgmma<C::kD, Major::mn>(dq, ds[step], C::Rows::by_row(keys, step), j > 0 || step > 0);
      wgmma_commit();
      if (j == 0) finish_store();
      if constexpr (C::kDrain) {
        wgmma_wait<0>();
        fence_registers(dq);
        release(&shared.k_empty[ring.stage]);
      }
      previous = ring.stage;
      ring.advance();
    }
    wgmma_wait<0>();
    fence_registers(dq);
    fence_registers(ds);
    if (!C::kDrain) release(&shared.k_empty[previous]);
  }

  __device__ void skip() {
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    release(&shared.k_empty[ring.stage]);
    barrier_wait(&shared.v_full[ring.stage], ring.parity);
    release(&shared.v_empty[ring.stage]);
    ring.advance();
  }

  /// Hands the last block's slot back once its gradient has been read. Called well after the store was issued.
  __device__ void finish_store() {
    if (warp == 0 && lane == 0 && unreleased >= 0) {
      store_wait_read<0>();
      barrier_arrive(&shared.empty[warpgroup][unreleased]);
    }
    unreleased = -1;
  }

  __device__ void run_block(const Schedule& schedule, const WorkItem& work, int row0, const QueryMaps& maps,
                            const float* lse_in, const float* rope, const RowStatistics& out) {
    if constexpr (C::kSlots == 1) finish_store();
    load_lse(schedule, work, row0, lse_in);
    barrier_wait(&shared.full[warpgroup][slot.stage], slot.parity);
    statistics(schedule, work, row0, out);
    gradient((min(row0 + kRows, schedule.tokens) - 1) / kRows);
    scale_all(dq, scale);
    if (rope != nullptr) {
      rotate_back<C::kD>(dq, rope, row0 + warp * 16 + lane / 4, schedule.tokens);
      clear(s), clear(dp);
    }
    std::uint8_t* tile = shared.o[warpgroup][slot.stage];
    stage_accumulator<C::kD>(tile, dq, 1.f, 1.f);
    named_barrier(1 + warpgroup, 128);
    if (warp == 0 && lane == 0) C::Rows::store(&maps.dqkv, tile, work.head * C::kD, row0, work.sequence);
    unreleased = slot.stage;
    slot.advance();
  }
};

template <typename C>
__global__ __launch_bounds__(C::Role::kThreads, 1) void query_gradient_kernel(const __grid_constant__ QueryMaps maps,
                                                                              const float* lse, const float* rope,
                                                                              const RowStatistics statistics,
                                                                              const Schedule schedule, float scale) {
  extern __shared__ std::uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(dynamic_shared + (-shared_address(dynamic_shared) & 1023));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&shared.k_full[i], 1), barrier_init(&shared.k_empty[i], 4 * C::kWarpgroups);
      barrier_init(&shared.v_full[i], 1), barrier_init(&shared.v_empty[i], 4 * C::kWarpgroups);
    }
    for (int w = 0; w < C::kWarpgroups; ++w)
      for (int i = 0; i < C::kSlots; ++i) barrier_init(&shared.full[w][i], 1), barrier_init(&shared.empty[w][i], 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (thread >= C::Role::kConsumers) {
    C::Role::become_producer();
    if (thread == C::Role::kConsumers) produce_keys<C>(shared, maps, schedule);
  } else {
    C::Role::become_consumer();
    QueryConsumer<C> consumer{shared, thread & 31, (thread >> 5) & 3, thread / 128, scale};
    for (int n = 0; n * static_cast<int>(gridDim.x) < schedule.items; ++n) {
      const int item = scheduled_item(n);
      if (item >= schedule.items) continue;
      const WorkItem work = work_item(schedule, item);
      const int row0 = owned_row<C::kWarpgroups>(work, consumer.warpgroup, n);
      const int tiles = (min(schedule.tokens, (work.tile + 1) * C::kWarpgroups * kRows) - 1) / kRows + 1;
      const bool any = row0 < schedule.tokens;
      if (any) consumer.run_block(schedule, work, row0, maps, lse, rope, statistics);
      for (int j = any ? row0 / kRows + 1 : 0; j < tiles; ++j) consumer.skip();
    }
    consumer.finish_store();
  }
}

/// What one warpgroup overlaps, as far as its registers allow.
enum class Overlap {
  none,    // scores and dp complete, then p and ds, then dv and dk complete: the other warpgroups fill the tensor cores
  within,  // p while dp runs and ds while dv runs; dv and dk complete
  across,  // also dv and dk while the next tile's scores run
};

// --- dk and dv: a warpgroup owns 64 keys and streams queries and do -------------------------------------------------

template <int kHeadDim, int kConsumers, int kRingStages, int kResidentSlots, Overlap kHowFar>
struct KeyConfig {
  static constexpr Overlap kOverlap = kHowFar;
  static constexpr int kD = kHeadDim, kWarpgroups = kConsumers, kStages = kRingStages, kSlots = kResidentSlots;
  using Role = Roles<kWarpgroups>;
  static constexpr int kStatisticBytes = kRows * sizeof(float);
  using Rows = Tile<kD, kRows>;

  struct Shared {
    alignas(1024) std::uint8_t q[kStages][Rows::kBytes];
    alignas(1024) std::uint8_t dout[kStages][Rows::kBytes];
    alignas(1024) std::uint8_t k[kWarpgroups][kSlots][Rows::kBytes];  // later the tile of dk
    alignas(1024) std::uint8_t v[kWarpgroups][kSlots][Rows::kBytes];  // later the tile of dv
    alignas(128) float lse[kStages][kRows];
    alignas(128) float delta[kStages][kRows];
    std::uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    std::uint64_t full[kWarpgroups][kSlots], empty[kWarpgroups][kSlots];
  };
};

struct KeyMaps {
  CUtensorMap qkv, dout, dqkv;
};

template <typename C>
__device__ void produce_queries(typename C::Shared& shared, const KeyMaps& maps, const Schedule& s,
                                const RowStatistics& statistics) {
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slots[C::kWarpgroups];
  for (int n = 0; n * static_cast<int>(gridDim.x) < s.items; ++n) {
    const int item = scheduled_item(n);
    if (item >= s.items) continue;
    const WorkItem work = work_item(s, item);
    const int key_column = (s.heads + work.head) * C::kD, value_column = key_column + s.kv_heads * C::kD;
#pragma unroll
    for (int w = 0; w < C::kWarpgroups; ++w) {
      const int row = owned_row<C::kWarpgroups>(work, w, n), slot = slots[w].stage;
      if (row >= s.tokens) continue;
      std::uint64_t* full = &shared.full[w][slot];
      barrier_wait(&shared.empty[w][slot], slots[w].parity ^ 1);
      barrier_expect(full, 2 * C::Rows::kBytes);
      C::Rows::load(shared.k[w][slot], &maps.qkv, full, key_column, row, work.sequence);
      C::Rows::load(shared.v[w][slot], &maps.qkv, full, value_column, row, work.sequence);
      slots[w].advance();
    }
    for (int head = work.head * s.group; head < (work.head + 1) * s.group; ++head)
      for (int row = work.tile * C::kWarpgroups * kRows; row < s.tokens; row += kRows, ring.advance()) {
        const int stage = ring.stage;
        const std::int64_t at = statistics.at(s, work.sequence, head, row);
        barrier_wait(&shared.q_empty[stage], ring.parity ^ 1);
        barrier_expect(&shared.q_full[stage], C::Rows::kBytes + C::kStatisticBytes);
        C::Rows::load(shared.q[stage], &maps.qkv, &shared.q_full[stage], head * C::kD, row, work.sequence);
        bulk_load(shared.lse[stage], statistics.lse + at, C::kStatisticBytes, &shared.q_full[stage]);
        barrier_wait(&shared.dout_empty[stage], ring.parity ^ 1);
        barrier_expect(&shared.dout_full[stage], C::Rows::kBytes + C::kStatisticBytes);
        C::Rows::load(shared.dout[stage], &maps.dout, &shared.dout_full[stage], head * C::kD, row, work.sequence);
        bulk_load(shared.delta[stage], statistics.delta + at, C::kStatisticBytes, &shared.dout_full[stage]);
      }
  }
}

/// Scores are held transposed, keys by queries, so that p and ds are register operands of the products for dv and dk.
template <typename C>
struct KeyConsumer {
  typename C::Shared& shared;
  const int lane, warp, warpgroup;
  const float scale;  // 1 / sqrt(D)
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slot;
  int unreleased = -1;

  float s[kRows / 2], dp[kRows / 2], dk[C::kD / 2], dv[C::kD / 2];
  std::uint32_t p[kRows / 16][4], ds[kRows / 16][4];

  /// Every lane arrives for itself: each has read the stage's statistics.
  __device__ void release(std::uint64_t* barrier) { barrier_arrive(barrier); }

  __device__ void issue_product(float (&d)[kRows / 2], std::uint32_t rows, std::uint32_t columns) {
    fence_registers(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step)
      wgmma<kRows>(d, C::Rows::by_column(rows, step), C::Rows::by_column(columns, step), step > 0);
    wgmma_commit();
  }

  __device__ void issue_gradient(float (&d)[C::kD / 2], const std::uint32_t (&a)[kRows / 16][4], std::uint32_t rows) {
    fence_registers(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      wgmma<C::kD, Major::mn>(d, a[step], C::Rows::by_row(rows, step), true);
    wgmma_commit();
  }

  /// One tile of queries; `previous` is the stage whose products for dk and dv are still in flight, or -1.
  __device__ void step(std::uint32_t keys, std::uint32_t values, bool diagonal, int previous) {
    const int stage = ring.stage;
    const std::uint32_t queries = shared_address(shared.q[stage]), douts = shared_address(shared.dout[stage]);
    const float scale2 = scale * kLog2e;
    barrier_wait(&shared.q_full[stage], ring.parity);
    issue_product(s, keys, queries);
    barrier_wait(&shared.dout_full[stage], ring.parity);
    issue_product(dp, values, douts);
    wgmma_wait<C::kOverlap == Overlap::none ? 0 : 1>();
    fence_registers(s);
    if constexpr (C::kOverlap == Overlap::across) fence_registers(p), fence_registers(ds);
    if (C::kOverlap == Overlap::across && previous >= 0)
      release(&shared.q_empty[previous]), release(&shared.dout_empty[previous]);
    const int key = warp * 16 + lane / 4, query = lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kRows / 8; ++t) {
      const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[stage][8 * t + query]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * t + i];
        x = exp2_approx(fmaf(x, scale2, i % 2 == 0 ? -lse.x : -lse.y));
        if (diagonal && 8 * t + query + i % 2 < key + i / 2 * 8) x = 0.f;
      }
      p[t / 2][t % 2 * 2] = pack_bf16(s[4 * t], s[4 * t + 1]);
      p[t / 2][t % 2 * 2 + 1] = pack_bf16(s[4 * t + 2], s[4 * t + 3]);
      if constexpr (C::kOverlap == Overlap::none) score_gradient(t, query);
    }
    issue_gradient(dv, p, douts);
    if constexpr (C::kOverlap != Overlap::none) {
      wgmma_wait<1>();
      fence_registers(dp);
#pragma unroll
      for (int t = 0; t < kRows / 8; ++t) score_gradient(t, query);
    }
    issue_gradient(dk, ds, queries);
    if constexpr (C::kOverlap != Overlap::across) {
      wgmma_wait<0>();
      fence_registers(dv);
      fence_registers(dk);
      fence_registers(p);
      fence_registers(ds);
      release(&shared.q_empty[stage]), release(&shared.dout_empty[stage]);
    }
  }

  /// ds = p (dp - delta) of queries 8 t ..
  __device__ void score_gradient(int t, int query) {
    const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[ring.stage][8 * t + query]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * t + 2 * h;
      ds[t / 2][t % 2 * 2 + h] = pack_bf16(s[i] * (dp[i] - delta.x), s[i + 1] * (dp[i + 1] - delta.y));
    }
  }

  __device__ void skip() {
    barrier_wait(&shared.q_full[ring.stage], ring.parity);
    release(&shared.q_empty[ring.stage]);
    barrier_wait(&shared.dout_full[ring.stage], ring.parity);
    release(&shared.dout_empty[ring.stage]);
  }

  /// Hands the last block's slot back once its gradient has been read. Called well after the store was issued.
  __device__ void finish_store() {
    if (warp == 0 && lane == 0 && unreleased >= 0) {
      store_wait_read<0>();
      barrier_arrive(&shared.empty[warpgroup][unreleased]);
    }
    unreleased = -1;
  }

  __device__ void run_block(const Schedule& schedule, const WorkItem& work, int row0, const KeyMaps& maps,
                            const float* rope) {
    if constexpr (C::kSlots == 1) finish_store();
    std::uint8_t *key_tile = shared.k[warpgroup][slot.stage], *value_tile = shared.v[warpgroup][slot.stage];
    barrier_wait(&shared.full[warpgroup][slot.stage], slot.parity);
    clear(dk), clear(dv);
    int previous = -1;
    for (int g = 0; g < schedule.group; ++g)
      for (int row = work.tile * C::kWarpgroups * kRows; row < schedule.tokens; row += kRows, ring.advance()) {
        if (row < row0) {
          skip();
          continue;
        }
        step(shared_address(key_tile), shared_address(value_tile), row == row0, previous);
        finish_store();
        previous = ring.stage;
      }
    wgmma_wait<0>();
    fence_registers(dk);
    fence_registers(dv);
    if (C::kOverlap == Overlap::across) release(&shared.q_empty[previous]), release(&shared.dout_empty[previous]);

    named_barrier(1 + warpgroup, 128);  // every warp is done with the keys and values
    stage_accumulator<C::kD>(value_tile, dv, 1.f, 1.f);
    scale_all(dk, scale);
    if (rope != nullptr) {
      rotate_back<C::kD>(dk, rope, row0 + warp * 16 + lane / 4, schedule.tokens);
      clear(s), clear(dp);
    }
    stage_accumulator<C::kD>(key_tile, dk, 1.f, 1.f);
    named_barrier(1 + warpgroup, 128);
    if (warp == 0 && lane == 0) {
      const int key_column = (schedule.heads + work.head) * C::kD;
      C::Rows::store(&maps.dqkv, value_tile, key_column + schedule.kv_heads * C::kD, row0, work.sequence);
      C::Rows::store(&maps.dqkv, key_tile, key_column, row0, work.sequence);
    }
    unreleased = slot.stage;
    slot.advance();
  }
};

template <typename C>
__global__ __launch_bounds__(C::Role::kThreads, 1) void key_gradient_kernel(const __grid_constant__ KeyMaps maps,
                                                                            const float* rope,
                                                                            const RowStatistics statistics,
                                                                            const Schedule schedule, float scale) {
  extern __shared__ std::uint8_t dynamic_shared[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(dynamic_shared + (-shared_address(dynamic_shared) & 1023));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      barrier_init(&shared.q_full[i], 1), barrier_init(&shared.q_empty[i], 128 * C::kWarpgroups);
      barrier_init(&shared.dout_full[i], 1), barrier_init(&shared.dout_empty[i], 128 * C::kWarpgroups);
    }
    for (int w = 0; w < C::kWarpgroups; ++w)
      for (int i = 0; i < C::kSlots; ++i) barrier_init(&shared.full[w][i], 1), barrier_init(&shared.empty[w][i], 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (thread >= C::Role::kConsumers) {
    C::Role::become_producer();
    if (thread == C::Role::kConsumers) produce_queries<C>(shared, maps, schedule, statistics);
  } else {
    C::Role::become_consumer();
    KeyConsumer<C> consumer{shared, thread & 31, (thread >> 5) & 3, thread / 128, scale};
    for (int n = 0; n * static_cast<int>(gridDim.x) < schedule.items; ++n) {
      const int item = scheduled_item(n);
      if (item >= schedule.items) continue;
      const WorkItem work = work_item(schedule, item);
      const int row0 = owned_row<C::kWarpgroups>(work, consumer.warpgroup, n);
      if (row0 < schedule.tokens) {
        consumer.run_block(schedule, work, row0, maps, rope);
      } else {
        for (int g = 0; g < schedule.group; ++g)
          for (int row = work.tile * C::kWarpgroups * kRows; row < schedule.tokens; row += kRows) {
            consumer.skip();
            consumer.ring.advance();
          }
      }
    }
    consumer.finish_store();
  }
}

// --- Launch ---------------------------------------------------------------------------------------------------------

RowStatistics row_statistics(const AttentionShape& shape, std::int64_t rows, void* workspace) {
  const std::int64_t padded = (shape.seq_len + kRows - 1) / kRows * kRows;
  const std::int64_t count = rows / shape.seq_len * shape.heads * padded;
  auto* lse = static_cast<float*>(workspace);
  return {lse, lse == nullptr ? nullptr : lse + count, static_cast<int>(padded)};
}

template <typename C>
void launch_query_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                           cudaStream_t stream) {
  const std::int64_t width = shape.heads * shape.head_dim;
  const QueryMaps maps{head_tensor_map(args.qkv, shape, rows, shape.columns()),
                       head_tensor_map(args.o, shape, rows, width), head_tensor_map(args.dout, shape, rows, width),
                       head_tensor_map(args.dqkv, shape, rows, shape.columns())};
  const Schedule schedule = make_schedule(shape, rows, C::kWarpgroups * kRows, true);
  constexpr int kSharedBytes = sizeof(typename C::Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
  check_cuda(cudaFuncSetAttribute(query_gradient_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  launch({"attention_dx: dq", static_cast<unsigned>(std::min(multiprocessors(), schedule.items)), C::Role::kThreads,
          stream, kSharedBytes},
         query_gradient_kernel<C>, maps, args.lse, args.rope, row_statistics(shape, rows, args.workspace), schedule,
         1.f / std::sqrt(static_cast<float>(shape.head_dim)));
}

template <typename C>
void launch_key_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                         cudaStream_t stream) {
  const KeyMaps maps{head_tensor_map(args.qkv, shape, rows, shape.columns()),
                     head_tensor_map(args.dout, shape, rows, shape.heads * shape.head_dim),
                     head_tensor_map(args.dqkv, shape, rows, shape.columns())};
  const Schedule schedule = make_schedule(shape, rows, C::kWarpgroups * kRows, false);
  constexpr int kSharedBytes = sizeof(typename C::Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
  check_cuda(cudaFuncSetAttribute(key_gradient_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  launch({"attention_dx: dk, dv", static_cast<unsigned>(std::min(multiprocessors(), schedule.items)), C::Role::kThreads,
          stream, kSharedBytes},
         key_gradient_kernel<C>, maps, args.rope, row_statistics(shape, rows, args.workspace), schedule,
         1.f / std::sqrt(static_cast<float>(shape.head_dim)));
}

}  // namespace

std::size_t attention_backward_workspace_bytes(const AttentionShape& shape, std::int64_t rows) {
  check_attention(shape, rows);
  const std::int64_t padded = (shape.seq_len + kRows - 1) / kRows * kRows;
  return static_cast<std::size_t>(rows / shape.seq_len * shape.heads * padded) * 2 * sizeof(float);
}

void attention_backward(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                        cudaStream_t stream) {
  check_attention(shape, rows);
  if (shape.head_dim == 32) {
    launch_query_gradient<QueryConfig<32, 3, 6, 2, false>>(shape, rows, args, stream);
    launch_key_gradient<KeyConfig<32, 3, 6, 2, Overlap::across>>(shape, rows, args, stream);
  } else if (shape.head_dim == 64) {
    launch_query_gradient<QueryConfig<64, 3, 4, 2, false>>(shape, rows, args, stream);
    if (shape.seq_len <= kShortSequence)
      launch_key_gradient<KeyConfig<64, 2, 6, 2, Overlap::across>>(shape, rows, args, stream);
    else
      launch_key_gradient<KeyConfig<64, 3, 6, 2, Overlap::none>>(shape, rows, args, stream);
  } else {
    launch_query_gradient<QueryConfig<128, 3, 2, 1, true>>(shape, rows, args, stream);
    launch_key_gradient<KeyConfig<128, 2, 4, 1, Overlap::within>>(shape, rows, args, stream);
  }
}

}  // namespace kiln::cuda

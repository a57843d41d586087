#include "kernels/attention_backward.cuh"

// dq: a warpgroup owns 64 queries and streams keys and values.
namespace kiln::cuda {
namespace {

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

template <typename C>
__device__ void produce_keys(typename C::Shared& shared, const GradientMaps& maps, const Schedule& s) {
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
      issue_product<C::kD>(s, queries, keys);
      barrier_wait(&shared.v_full[ring.stage], ring.parity);
      issue_product<C::kD>(dp, douts, shared_address(shared.v[ring.stage]));
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
      issue_gradient<C::kD>(dq, ds, keys, j > 0);
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

  __device__ void run_block(const Schedule& schedule, const WorkItem& work, int row0, const GradientMaps& maps,
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
__global__ __launch_bounds__(C::Role::kThreads, 1) void query_gradient_kernel(const __grid_constant__ GradientMaps maps,
                                                                              const float* lse, const float* rope,
                                                                              const RowStatistics statistics,
                                                                              const Schedule schedule, float scale) {
  auto& shared = aligned_shared<typename C::Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    barriers_init(shared.k_full, 1), barriers_init(shared.k_empty, 4 * C::kWarpgroups);
    barriers_init(shared.v_full, 1), barriers_init(shared.v_empty, 4 * C::kWarpgroups);
    for (int w = 0; w < C::kWarpgroups; ++w) barriers_init(shared.full[w], 1), barriers_init(shared.empty[w], 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (warp_index() >= C::Role::kConsumers / 32) {
    C::Role::become_producer();
    if (thread == C::Role::kConsumers) produce_keys<C>(shared, maps, schedule);
  } else {
    C::Role::become_consumer();
    QueryConsumer<C> consumer{shared, thread & 31, warp_index() & 3, warp_index() / 4, scale};
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

template <typename C>
void launch_query_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                           cudaStream_t stream) {
  const Schedule schedule = make_schedule(shape, rows, C::kWarpgroups * kRows, true, args.order);
  launch_persistent<typename C::Shared>("attention_dx: dq", query_gradient_kernel<C>, schedule.items, C::Role::kThreads,
                                        stream, gradient_maps(shape, rows, args), args.lse, args.rope,
                                        row_statistics(shape, rows, args.workspace), schedule, score_scale(shape));
}

}  // namespace

void attention_query_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                              cudaStream_t stream) {
  if (shape.head_dim == 32)
    launch_query_gradient<QueryConfig<32, 3, 6, 2, false>>(shape, rows, args, stream);
  else if (shape.head_dim == 64)
    launch_query_gradient<QueryConfig<64, 3, 4, 2, false>>(shape, rows, args, stream);
  else
    launch_query_gradient<QueryConfig<128, 3, 2, 1, true>>(shape, rows, args, stream);
}

}  // namespace kiln::cuda

#include "kernels/attention_backward.cuh"

// dk and dv: a warpgroup owns 64 keys and streams queries and do.
namespace kiln::cuda {
namespace {

template <int kHeadDim, int kConsumers, int kRingStages, int kResidentSlots>
struct KeyConfig {
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

template <typename C>
__device__ void produce_queries(typename C::Shared& shared, const GradientMaps& maps, const Schedule& s,
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

  /// The warp is done with a stage, statistics included.
  __device__ void release(std::uint64_t* barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  /// One tile of queries. Each pair of products completes before the next step: the other warpgroups fill the tensor
  /// cores meanwhile, and registers are short.
  __device__ void step(std::uint32_t keys, std::uint32_t values, bool diagonal) {
    const int stage = ring.stage;
    const std::uint32_t queries = shared_address(shared.q[stage]), douts = shared_address(shared.dout[stage]);
    barrier_wait(&shared.q_full[stage], ring.parity);
    issue_product<C::kD>(s, keys, queries);
    barrier_wait(&shared.dout_full[stage], ring.parity);
    issue_product<C::kD>(dp, values, douts);
    wgmma_wait<0>();
    fence_registers(s);
    fence_registers(dp);
    probabilities(s, shared.lse[stage], scale * kLog2e, diagonal);
    pack_operand<kRows / 2>(p, s);
    score_gradient(ds, s, dp, shared.delta[stage]);
    issue_gradient<C::kD>(dv, p, douts, true);
    issue_gradient<C::kD>(dk, ds, queries, true);
    wgmma_wait<0>();
    fence_registers(dv);
    fence_registers(dk);
    fence_registers(p);
    fence_registers(ds);
    release(&shared.q_empty[stage]), release(&shared.dout_empty[stage]);
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

  __device__ void run_block(const Schedule& schedule, const WorkItem& work, int row0, const GradientMaps& maps,
                            const float* rope) {
    if constexpr (C::kSlots == 1) finish_store();
    std::uint8_t *key_tile = shared.k[warpgroup][slot.stage], *value_tile = shared.v[warpgroup][slot.stage];
    barrier_wait(&shared.full[warpgroup][slot.stage], slot.parity);
    clear(dk), clear(dv);
    for (int g = 0; g < schedule.group; ++g)
      for (int row = work.tile * C::kWarpgroups * kRows; row < schedule.tokens; row += kRows, ring.advance()) {
        if (row < row0) {
          skip();
          continue;
        }
        step(shared_address(key_tile), shared_address(value_tile), row == row0);
        finish_store();
      }

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
__global__ __launch_bounds__(C::Role::kThreads, 1) void key_gradient_kernel(const __grid_constant__ GradientMaps maps,
                                                                            const float* rope,
                                                                            const RowStatistics statistics,
                                                                            const Schedule schedule, float scale) {
  auto& shared = aligned_shared<typename C::Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    barriers_init(shared.q_full, 1), barriers_init(shared.q_empty, 4 * C::kWarpgroups);
    barriers_init(shared.dout_full, 1), barriers_init(shared.dout_empty, 4 * C::kWarpgroups);
    for (int w = 0; w < C::kWarpgroups; ++w) barriers_init(shared.full[w], 1), barriers_init(shared.empty[w], 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (warp_index() >= C::Role::kConsumers / 32) {
    C::Role::become_producer();
    if (thread == C::Role::kConsumers) produce_queries<C>(shared, maps, schedule, statistics);
  } else {
    C::Role::become_consumer();
    KeyConsumer<C> consumer{shared, thread & 31, warp_index() & 3, warp_index() / 4, scale};
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

template <typename C>
void launch_key_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                         cudaStream_t stream) {
  const Schedule schedule = make_schedule(shape, rows, C::kWarpgroups * kRows, false, opposite(args.order));
  launch_persistent<typename C::Shared>("attention_dx: dk, dv", key_gradient_kernel<C>, schedule.items,
                                        C::Role::kThreads, stream, gradient_maps(shape, rows, args), args.rope,
                                        row_statistics(shape, rows, args.workspace), schedule, score_scale(shape));
}

}  // namespace

void attention_key_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                            cudaStream_t stream) {
  if (shape.head_dim == 32)
    launch_key_gradient<KeyConfig<32, 3, 6, 2>>(shape, rows, args, stream);
  else if (shape.head_dim == 64)
    launch_key_gradient<KeyConfig<64, 3, 6, 2>>(shape, rows, args, stream);
  else
    launch_key_gradient<KeyConfig<128, 2, 3, 2>>(shape, rows, args, stream);
}

}  // namespace kiln::cuda

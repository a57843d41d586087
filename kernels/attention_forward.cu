#include <cmath>

#include "kernels/attention.h"
#include "kernels/attention_tile.cuh"

namespace kiln::cuda {
namespace {

/// How one head size is cut: kWarpgroups consumers of 64 queries, kKeys keys per tile of the ring.
template <int kHeadDim, int kConsumers, int kTileKeys, int kRingStages, int kQuerySlots, bool kRegisterQuery>
struct ForwardConfig {
  static constexpr int kD = kHeadDim, kWarpgroups = kConsumers, kKeys = kTileKeys, kStages = kRingStages;
  static constexpr bool kQueryInRegisters = kRegisterQuery;
  static constexpr int kSlots = kQuerySlots;  // query tiles per warpgroup: one in use, the others being loaded
  using Role = Roles<kWarpgroups>;
  using Rows = Tile<kD, kRows>;
  using Keys = Tile<kD, kKeys>;

  struct Shared {
    alignas(1024) std::uint8_t k[kStages][Keys::kBytes];
    alignas(1024) std::uint8_t v[kStages][Keys::kBytes];
    alignas(1024) std::uint8_t q[kWarpgroups][kSlots][Rows::kBytes];  // later the output tile
    std::uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    std::uint64_t q_full[kWarpgroups][kSlots], q_empty[kWarpgroups][kSlots];
  };
};

/// Query block of a warpgroup: roles rotate from item to item, since later rows see more keys.
template <int kWarpgroups>
__device__ int query_row(const WorkItem& work, int warpgroup, int n) {
  return (work.tile * kWarpgroups + (warpgroup + n) % kWarpgroups) * kRows;
}

template <typename C>
__device__ int key_tiles(const Schedule& s, const WorkItem& work) {
  return (min(s.tokens, (work.tile + 1) * C::kWarpgroups * kRows) - 1) / C::kKeys + 1;
}

template <typename C>
__device__ void produce(typename C::Shared& shared, const CUtensorMap* qkv, const Schedule& s) {
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slots[C::kWarpgroups];
  for (int n = 0; n * static_cast<int>(gridDim.x) < s.items; ++n) {
    const int item = scheduled_item(n);
    if (item >= s.items) continue;
    const WorkItem work = work_item(s, item);
    const int key_column = (s.heads + s.by_group(work.head)) * C::kD, value_column = key_column + s.kv_heads * C::kD;
#pragma unroll
    for (int w = 0; w < C::kWarpgroups; ++w) {
      const int row = query_row<C::kWarpgroups>(work, w, n), slot = slots[w].stage;
      if (row >= s.tokens) continue;
      barrier_wait(&shared.q_empty[w][slot], slots[w].parity ^ 1);
      barrier_expect(&shared.q_full[w][slot], C::Rows::kBytes);
      C::Rows::load(shared.q[w][slot], qkv, &shared.q_full[w][slot], work.head * C::kD, row, work.sequence);
      slots[w].advance();
    }
    const int tiles = key_tiles<C>(s, work);
    for (int j = 0; j < tiles; ++j, ring.advance()) {
      barrier_wait(&shared.k_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.k_full[ring.stage], C::Keys::kBytes);
      C::Keys::load(shared.k[ring.stage], qkv, &shared.k_full[ring.stage], key_column, j * C::kKeys, work.sequence);
      barrier_wait(&shared.v_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(&shared.v_full[ring.stage], C::Keys::kBytes);
      C::Keys::load(shared.v[ring.stage], qkv, &shared.v_full[ring.stage], value_column, j * C::kKeys, work.sequence);
    }
  }
}

/// One warpgroup's 64 queries: the running softmax of Dao 2023, in units of base 2.
template <typename C>
struct Consumer {
  static constexpr int kLazyRescale = 8;  // the maximum may lag by this power of two: p stays far inside f32 and bf16

  typename C::Shared& shared;
  const int lane, warp, warpgroup;
  const float scale;  // log2(e) / sqrt(D)
  RingIndex<C::kStages> ring;
  RingIndex<C::kSlots> slot;
  int unreleased = -1;  // slot whose output is still being stored

  float s[C::kKeys / 2], o[C::kD / 2];
  std::uint32_t p[C::kKeys / 16][4];
  std::uint32_t q[C::kQueryInRegisters ? C::kD / 16 : 1][4];
  float maximum[2], sum[2], rescale[2];
  bool moved;

  __device__ void release(std::uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ void issue_scores(std::uint32_t query_tile) {
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    const std::uint32_t keys = shared_address(shared.k[ring.stage]);
    fence_registers(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kD / 16; ++step) {
      if constexpr (C::kQueryInRegisters)
        wgmma<C::kKeys>(s, q[step], C::Keys::by_column(keys, step), step > 0);
      else
        wgmma<C::kKeys>(s, C::Rows::by_column(query_tile, step), C::Keys::by_column(keys, step), step > 0);
    }
    wgmma_commit();
  }

  __device__ void issue_output(const RingIndex<C::kStages>& at, bool accumulate) {
    barrier_wait(&shared.v_full[at.stage], at.parity);
    const std::uint32_t values = shared_address(shared.v[at.stage]);
    fence_registers(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step)
      wgmma<C::kD, Major::mn>(o, p[step], C::Keys::by_row(values, step), accumulate || step > 0);
    wgmma_commit();
  }

  /// Of the tile with the diagonal, keys beyond the rows of this warp get no weight.
  __device__ void mask(int row0, int key0) {
    const int diagonal = row0 + warp * 16 - key0, row = diagonal + lane / 4, key = lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < C::kKeys / 8; ++t) {
      if (8 * t + 7 <= diagonal) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * t + key + i % 2 > row + i / 2 * 8) s[4 * t + i] = -INFINITY;
    }
  }

  /// s becomes exp2(scale (s - maximum)). When the maximum moved, `rescale` is what o has to be multiplied by.
  __device__ void softmax(bool first) {
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    const float slack = kLazyRescale / scale;
    moved = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = quad_max(top[h]);
      const bool move = first || top[h] > maximum[h] + slack;
      const float next = move ? top[h] : maximum[h];
      rescale[h] = first ? 1.f : exp2_approx((maximum[h] - next) * scale);
      sum[h] = first ? 0.f : sum[h] * rescale[h];
      maximum[h] = next;
      moved |= move;
    }
    moved = !first && __any_sync(0xffffffff, moved);
    const float offset[2] = {maximum[0] * scale, maximum[1] * scale};
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) {
      s[i] = exp2_approx(fmaf(s[i], scale, -offset[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
  }

  /// Key tiles 0..last of this block of queries; o is left unnormalised.
  __device__ void attend(int row0, int last, std::uint32_t query_tile) {
    issue_scores(query_tile);
    wgmma_wait<0>();
    fence_registers(s);
    release(&shared.k_empty[ring.stage]);
    if (last == 0) mask(row0, 0);
    softmax(true);
    finish_store();
    pack_operand<C::kKeys / 2>(p, s);
    for (int j = 1; j <= last; ++j) {
      const RingIndex<C::kStages> previous = ring;
      ring.advance();
      issue_scores(query_tile);
      issue_output(previous, j > 1);
      wgmma_wait<1>();
      fence_registers(s);
      release(&shared.k_empty[ring.stage]);
      if (j == last) mask(row0, j * C::kKeys);
      softmax(false);
      fence_registers(s);  // or the compiler waits for o before the softmax
      wgmma_wait<0>();
      fence_registers(o);
      fence_registers(p);
      release(&shared.v_empty[previous.stage]);
      if (moved) {
#pragma unroll
        for (int i = 0; i < C::kD / 2; ++i) o[i] *= rescale[i / 2 % 2];
      }
      pack_operand<C::kKeys / 2>(p, s);
    }
    issue_output(ring, last > 0);
    wgmma_wait<0>();
    fence_registers(o);
    fence_registers(p);
    release(&shared.v_empty[ring.stage]);
    ring.advance();
  }

  __device__ void skip() {
    barrier_wait(&shared.k_full[ring.stage], ring.parity);
    release(&shared.k_empty[ring.stage]);
    barrier_wait(&shared.v_full[ring.stage], ring.parity);
    release(&shared.v_empty[ring.stage]);
    ring.advance();
  }

  /// Hands the last block's slot back once its output has been read. Called well after the store was issued.
  __device__ void finish_store() {
    if (warp == 0 && lane == 0 && unreleased >= 0) {
      store_wait_read<0>();
      barrier_arrive(&shared.q_empty[warpgroup][unreleased]);
    }
    unreleased = -1;
  }

  __device__ void run_block(const Schedule& schedule, const WorkItem& work, int row0, int last, const CUtensorMap* out,
                            float* lse) {
    std::uint8_t* tile = shared.q[warpgroup][slot.stage];
    barrier_wait(&shared.q_full[warpgroup][slot.stage], slot.parity);
    if constexpr (C::kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < C::kD / 16; ++step) load_fragment<C::kD>(q[step], tile, step);
    }
    attend(row0, last, shared_address(tile));

    const int row = row0 + warp * 16 + lane / 4;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = quad_sum(sum[h]);
      inverse[h] = __fdividef(1.f, total);
      if (lane % 4 == 0 && row + 8 * h < schedule.tokens) {
        const std::int64_t at = static_cast<std::int64_t>(work.sequence) * schedule.tokens + row + 8 * h;
        lse[at * schedule.heads + work.head] = (maximum[h] * scale + __log2f(total)) * (1.f / kLog2e);
      }
    }
    if constexpr (!C::kQueryInRegisters) named_barrier(1 + warpgroup, 128);  // every warp is done with the queries
    stage_accumulator<C::kD>(tile, o, inverse[0], inverse[1]);
    named_barrier(1 + warpgroup, 128);
    if (warp == 0 && lane == 0) C::Rows::store(out, tile, work.head * C::kD, row0, work.sequence);
    unreleased = slot.stage;
    slot.advance();
  }
};

template <typename C>
__global__ __launch_bounds__(C::Role::kThreads, 1) void forward_kernel(const __grid_constant__ CUtensorMap qkv,
                                                                       const __grid_constant__ CUtensorMap out,
                                                                       float* lse, const Schedule schedule,
                                                                       float scale) {
  auto& shared = aligned_shared<typename C::Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    barriers_init(shared.k_full, 1), barriers_init(shared.k_empty, 4 * C::kWarpgroups);
    barriers_init(shared.v_full, 1), barriers_init(shared.v_empty, 4 * C::kWarpgroups);
    for (int w = 0; w < C::kWarpgroups; ++w) barriers_init(shared.q_full[w], 1), barriers_init(shared.q_empty[w], 1);
    fence_barrier_init();
    prefetch_tensor_map(&qkv), prefetch_tensor_map(&out);
  }
  __syncthreads();
  if (warp_index() >= C::Role::kConsumers / 32) {
    C::Role::become_producer();
    if (thread == C::Role::kConsumers) produce<C>(shared, &qkv, schedule);
  } else {
    C::Role::become_consumer();
    Consumer<C> consumer{shared, thread & 31, warp_index() & 3, warp_index() / 4, scale};
    for (int n = 0; n * static_cast<int>(gridDim.x) < schedule.items; ++n) {
      const int item = scheduled_item(n);
      if (item >= schedule.items) continue;
      const WorkItem work = work_item(schedule, item);
      const int row0 = query_row<C::kWarpgroups>(work, consumer.warpgroup, n);
      const int last = row0 < schedule.tokens ? (min(row0 + kRows, schedule.tokens) - 1) / C::kKeys : -1;
      if (last >= 0) consumer.run_block(schedule, work, row0, last, &out, lse);
      for (int j = last + 1; j < key_tiles<C>(schedule, work); ++j) consumer.skip();
    }
    consumer.finish_store();
  }
}

template <typename C>
void launch_forward(const AttentionShape& shape, std::int64_t rows, const AttentionForward& args, cudaStream_t stream) {
  const CUtensorMap qkv = head_tensor_map(args.qkv, shape, rows, shape.columns());
  const CUtensorMap out = head_tensor_map(args.o, shape, rows, shape.heads * shape.head_dim);
  const Schedule schedule = make_schedule(shape, rows, C::kWarpgroups * kRows, true, args.order);
  const float scale = kLog2e / std::sqrt(static_cast<float>(shape.head_dim));
  launch_persistent<typename C::Shared>("attention", forward_kernel<C>, schedule.items, C::Role::kThreads, stream, qkv,
                                        out, args.lse, schedule, scale);
}

}  // namespace

bool attention_supported(const AttentionShape& shape) {
  const bool head_dim = shape.head_dim == 32 || shape.head_dim == 64 || shape.head_dim == 128;
  return head_dim && shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0 && shape.seq_len > 0;
}

void check_attention(const AttentionShape& shape, std::int64_t rows) {
  check(attention_supported(shape),
        "attention on CUDA: head size {} with {} query and {} key heads; it takes head sizes 32, 64 and 128 and a "
        "multiple of the key heads",
        shape.head_dim, shape.heads, shape.kv_heads);
  check(rows * shape.heads < (std::int64_t{1} << 31), "attention: {} rows of {} heads exceed 2^31 pairs", rows,
        shape.heads);
  check(rows > 0 && rows % shape.seq_len == 0, "attention: {} rows are no multiple of the sequence length {}", rows,
        shape.seq_len);
}

void attention_forward(const AttentionShape& shape, std::int64_t rows, const AttentionForward& args,
                       cudaStream_t stream) {
  check_attention(shape, rows);
  if (shape.head_dim == 32) return launch_forward<ForwardConfig<32, 4, 64, 8, 2, true>>(shape, rows, args, stream);
  if (shape.head_dim == 64 && shape.seq_len <= kShortSequence)
    return launch_forward<ForwardConfig<64, 4, 64, 8, 2, false>>(shape, rows, args, stream);
  if (shape.head_dim == 64) return launch_forward<ForwardConfig<64, 3, 128, 3, 2, false>>(shape, rows, args, stream);
  launch_forward<ForwardConfig<128, 3, 64, 3, 2, false>>(shape, rows, args, stream);
}

}  // namespace kiln::cuda

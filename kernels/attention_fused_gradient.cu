#include <iterator>
#include <utility>

#include "kernels/attention_backward.cuh"

// dq, dk and dv of short sequences in one kernel, scores and dp computed once. A block takes one (sequence, head) pair
// at a time, whose tiles all fit in shared memory. Two warpgroups own keys: they hold scores transposed and sum dk and
// dv in registers, and hand each ds to a third, which sums dq in a fixed order. Two threads load, and two warps compute
// the rows' statistics. Bytes are the floor: 8 N H D bf16, N H f32.
namespace kiln::cuda {
namespace {

constexpr int kMaxBlocks = kShortSequence / kRows;  // of 64 rows in a sequence

template <int kHeadDim>
struct FusedConfig {
  static constexpr int kD = kHeadDim;
  static constexpr int kQueryStages = kMaxBlocks + 1, kKeyStages = kMaxBlocks, kOutputStages = 2, kScoreStages = 2;
  static constexpr int kThreads = 512;  // keys, keys, dq, loads and statistics
  static constexpr int kKeyRegisters = 184, kQueryRegisters = 112, kLoadRegisters = 32;
  using Rows = Tile<kD, kRows>;
  using Scores = Tile<kRows, kRows>;

  struct Shared {
    alignas(1024) std::uint8_t q[kQueryStages][Rows::kBytes];
    alignas(1024) std::uint8_t dout[kQueryStages][Rows::kBytes];
    alignas(1024) std::uint8_t k[kKeyStages][Rows::kBytes];
    alignas(1024) std::uint8_t v[kKeyStages][Rows::kBytes];  // later the tile of dv
    alignas(1024) std::uint8_t o[kOutputStages][Rows::kBytes];
    alignas(1024) std::uint8_t ds[2][kScoreStages][Scores::kBytes];  // keys by queries
    alignas(1024) std::uint8_t dk[2][Rows::kBytes];
    alignas(1024) std::uint8_t dq[Rows::kBytes];
    alignas(128) float lse[kQueryStages][kRows];  // in base 2
    alignas(128) float delta[kQueryStages][kRows];
    std::uint64_t query_full[kQueryStages], query_empty[kQueryStages], statistics_full[kQueryStages];
    std::uint64_t key_full[kKeyStages], key_empty[kKeyStages];
    std::uint64_t o_full[kOutputStages], o_empty[kOutputStages];
    std::uint64_t ds_full[2][kScoreStages], ds_empty[2][kScoreStages];
  };

  __device__ static void init(Shared& shared) {
    barriers_init(shared.query_full, 1), barriers_init(shared.query_empty, 256);  // the threads that own keys
    barriers_init(shared.statistics_full, 64);
    barriers_init(shared.key_full, 1), barriers_init(shared.key_empty, 5);  // the store of dv, the warps of dq
    barriers_init(shared.o_full, 1), barriers_init(shared.o_empty, 64);
    for (int w = 0; w < 2; ++w) barriers_init(shared.ds_full[w], 4), barriers_init(shared.ds_empty[w], 4);
  }
};

struct Problem {
  GradientMaps maps;
  const float *lse, *rope;
  int tokens, heads, blocks, pairs;  // blocks of 64 rows in a sequence
  float scale;                       // 1 / sqrt(D)
  RowOrder order;

  __device__ int pair(int n) const { return order == RowOrder::ascending ? n : pairs - 1 - n; }
  __device__ int key_column(int head, int head_dim) const { return (heads + head) * head_dim; }
  __device__ int value_column(int head, int head_dim) const { return (2 * heads + head) * head_dim; }
};

/// Where block `offset` of the current pair lies in a ring.
template <int kStages>
__device__ RingIndex<kStages> ahead(const RingIndex<kStages>& ring, int offset) {
  const int stage = ring.stage + offset;
  return {stage < kStages ? stage : stage - kStages, stage < kStages ? ring.parity : ring.parity ^ 1};
}

// --- Loads and statistics -------------------------------------------------------------------------------------------

template <typename C>
__device__ void load_queries(typename C::Shared& shared, const Problem& problem) {
  RingIndex<C::kQueryStages> ring;
  RingIndex<C::kOutputStages> output;
  for (int n = static_cast<int>(blockIdx.x); n < problem.pairs; n += static_cast<int>(gridDim.x)) {
    const int pair = problem.pair(n), sequence = pair / problem.heads,
              column = (pair - sequence * problem.heads) * C::kD;
    for (int i = 0; i < problem.blocks; ++i, ring.advance(), output.advance()) {
      std::uint64_t* full = &shared.query_full[ring.stage];
      barrier_wait(&shared.query_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(full, 2 * C::Rows::kBytes);
      C::Rows::load(shared.dout[ring.stage], &problem.maps.dout, full, column, i * kRows, sequence);
      C::Rows::load(shared.q[ring.stage], &problem.maps.qkv, full, column, i * kRows, sequence);
      full = &shared.o_full[output.stage];
      barrier_wait(&shared.o_empty[output.stage], output.parity ^ 1);
      barrier_expect(full, C::Rows::kBytes);
      C::Rows::load(shared.o[output.stage], &problem.maps.o, full, column, i * kRows, sequence);
    }
  }
}

template <typename C>
__device__ void load_keys(typename C::Shared& shared, const Problem& problem) {
  RingIndex<C::kKeyStages> ring;
  for (int n = static_cast<int>(blockIdx.x); n < problem.pairs; n += static_cast<int>(gridDim.x)) {
    const int pair = problem.pair(n), sequence = pair / problem.heads, head = pair - sequence * problem.heads;
    for (int j = 0; j < problem.blocks; ++j, ring.advance()) {
      std::uint64_t* full = &shared.key_full[ring.stage];
      barrier_wait(&shared.key_empty[ring.stage], ring.parity ^ 1);
      barrier_expect(full, 2 * C::Rows::kBytes);
      C::Rows::load(shared.k[ring.stage], &problem.maps.qkv, full, problem.key_column(head, C::kD), j * kRows,
                    sequence);
      C::Rows::load(shared.v[ring.stage], &problem.maps.qkv, full, problem.value_column(head, C::kD), j * kRows,
                    sequence);
    }
  }
}

/// Sum of the products of eight bf16 pairs.
__device__ float dot8(const uint4& a, const uint4& b) {
  const std::uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

/// lse and delta = rowsum(do o) of every query block, by 64 threads. A row past the sequence has lse +inf and delta 0,
/// so that its probabilities are 0.
template <typename C>
__device__ void compute_statistics(typename C::Shared& shared, const Problem& problem, int thread) {
  constexpr int kLanes = C::kD / 8, kRowsAtOnce = 64 / kLanes;  // a row is kLanes loads of 16 bytes
  RingIndex<C::kQueryStages> ring;
  RingIndex<C::kOutputStages> output;
  for (int n = static_cast<int>(blockIdx.x); n < problem.pairs; n += static_cast<int>(gridDim.x)) {
    const int pair = problem.pair(n), sequence = pair / problem.heads, head = pair - sequence * problem.heads;
    for (int i = 0; i < problem.blocks; ++i, ring.advance(), output.advance()) {
      const int row = i * kRows + thread;
      const std::int64_t at = (static_cast<std::int64_t>(sequence) * problem.tokens + row) * problem.heads + head;
      const float lse = row < problem.tokens ? problem.lse[at] * kLog2e : INFINITY;
      barrier_wait(&shared.query_empty[ring.stage], ring.parity ^ 1);  // the statistics that lay here have been read
      barrier_wait(&shared.query_full[ring.stage], ring.parity);
      barrier_wait(&shared.o_full[output.stage], output.parity);
#pragma unroll 2
      for (int first = 0; first < kRows; first += kRowsAtOnce) {
        const int r = first + thread / kLanes, offset = C::Rows::offset(r, thread % kLanes * 8);
        float sum = dot8(*reinterpret_cast<const uint4*>(shared.dout[ring.stage] + offset),
                         *reinterpret_cast<const uint4*>(shared.o[output.stage] + offset));
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        if (thread % kLanes == 0) shared.delta[ring.stage][r] = sum;
      }
      shared.lse[ring.stage][thread] = lse;
      barrier_arrive(&shared.statistics_full[ring.stage]);
      barrier_arrive(&shared.o_empty[output.stage]);
    }
  }
}

// --- dk and dv ------------------------------------------------------------------------------------------------------

/// Warpgroup w owns key blocks w and 3 - w, one after the other: of four blocks both take five of ten tiles.
template <typename C>
struct FusedKeys {
  typename C::Shared& shared;
  const Problem& problem;
  const int lane, warp, warpgroup;
  RingIndex<C::kQueryStages> queries;  // block 0 of the pair
  RingIndex<C::kKeyStages> keys;
  RingIndex<C::kScoreStages> score;
  int unreleased = -1;  // stage of keys whose dv is still being stored

  float s[kRows / 2], dp[kRows / 2], dk[C::kD / 2], dv[C::kD / 2];
  std::uint32_t p[kRows / 16][4], ds[kRows / 16][4];

  __device__ bool leads() const { return warp == 0 && lane == 0; }

  __device__ void hand_over_scores() {
    barrier_wait(&shared.ds_empty[warpgroup][score.stage], score.parity ^ 1);
#pragma unroll
    for (int c = 0; c < kRows / 16; ++c) store_fragment<kRows>(shared.ds[warpgroup][score.stage], ds[c], c);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.ds_full[warpgroup][score.stage]);
    score.advance();
  }

  __device__ void step(std::uint32_t key_tile, std::uint32_t value_tile, const RingIndex<C::kQueryStages>& at,
                       bool diagonal) {
    const std::uint32_t query_tile = shared_address(shared.q[at.stage]);
    const std::uint32_t dout_tile = shared_address(shared.dout[at.stage]);
    barrier_wait(&shared.query_full[at.stage], at.parity);
    issue_product<C::kD>(s, key_tile, query_tile);
    issue_product<C::kD>(dp, value_tile, dout_tile);
    finish_store();
    barrier_wait(&shared.statistics_full[at.stage], at.parity);
    wgmma_wait<1>();
    fence_registers(s);
    probabilities(s, shared.lse[at.stage], problem.scale * kLog2e, diagonal);
    pack_operand<kRows / 2>(p, s);
    issue_gradient<C::kD>(dv, p, dout_tile, true);
    wgmma_wait<1>();
    fence_registers(dp);
    score_gradient(ds, s, dp, shared.delta[at.stage]);
    issue_gradient<C::kD>(dk, ds, query_tile, true);
    hand_over_scores();
    wgmma_wait<0>();
    fence_registers(dv);
    fence_registers(dk);
    fence_registers(p);
    fence_registers(ds);
  }

  /// Hands a stage of keys back once its dv has been read. Called well after the store was issued.
  __device__ void finish_store() {
    if (leads() && unreleased >= 0) {
      store_wait_read<0>();
      barrier_arrive(&shared.key_empty[unreleased]);
    }
    unreleased = -1;
  }

  __device__ void run_block(int j, int sequence, int head) {
    const RingIndex<C::kKeyStages> at = ahead(keys, j);
    barrier_wait(&shared.key_full[at.stage], at.parity);
    clear(dk), clear(dv);
    for (int i = j; i < problem.blocks; ++i) {
      const RingIndex<C::kQueryStages> query = ahead(queries, i);
      step(shared_address(shared.k[at.stage]), shared_address(shared.v[at.stage]), query, i == j);
      const int last = kMaxBlocks - 1 - warpgroup <= i ? kMaxBlocks - 1 - warpgroup : warpgroup;
      if (j == last) barrier_arrive(&shared.query_empty[query.stage]);
    }
    named_barrier(1 + warpgroup, 128);  // every warp is done with the values
    stage_accumulator<C::kD>(shared.v[at.stage], dv, 1.f, 1.f);
    scale_all(dk, problem.scale);
    if (problem.rope != nullptr) {
      rotate_back<C::kD>(dk, problem.rope, j * kRows + warp * 16 + lane / 4, problem.tokens);
      clear(s), clear(dp);
    }
    stage_accumulator<C::kD>(shared.dk[warpgroup], dk, 1.f, 1.f);
    named_barrier(1 + warpgroup, 128);
    if (leads()) {
      C::Rows::store(&problem.maps.dqkv, shared.v[at.stage], problem.value_column(head, C::kD), j * kRows, sequence);
      C::Rows::store(&problem.maps.dqkv, shared.dk[warpgroup], problem.key_column(head, C::kD), j * kRows, sequence);
    }
    unreleased = at.stage;
  }

  __device__ void run() {
    for (int n = static_cast<int>(blockIdx.x); n < problem.pairs; n += static_cast<int>(gridDim.x)) {
      const int pair = problem.pair(n), sequence = pair / problem.heads, head = pair - sequence * problem.heads;
      for (int i = 0; i < min(warpgroup, problem.blocks); ++i) {  // queries that none of its keys sees
        const RingIndex<C::kQueryStages> query = ahead(queries, i);
        barrier_wait(&shared.query_full[query.stage], query.parity);
        barrier_arrive(&shared.query_empty[query.stage]);
      }
      for (int half = 0; half < 2; ++half) {
        const int j = half == 0 ? warpgroup : kMaxBlocks - 1 - warpgroup;
        if (j < problem.blocks) run_block(j, sequence, head);
      }
      queries = ahead(queries, problem.blocks), keys = ahead(keys, problem.blocks);
    }
    finish_store();
  }
};

// --- dq -------------------------------------------------------------------------------------------------------------

struct Product {
  int key, query;
};

/// The order in which dq is summed. Of each key warpgroup it is the order in which that one hands ds over; query blocks
/// complete in turn, with at most two of them unfinished.
constexpr Product kOrder[] = {{0, 0}, {1, 1}, {0, 1}, {1, 2}, {0, 2}, {1, 3}, {0, 3}, {2, 2}, {3, 3}, {2, 3}};

constexpr int kProducts = std::size(kOrder);

constexpr bool is_first(int n) {
  for (int i = 0; i < n; ++i)
    if (kOrder[i].query == kOrder[n].query) return false;
  return true;
}

constexpr bool is_last(int n) {
  for (int i = n + 1; i < kProducts; ++i)
    if (kOrder[i].query == kOrder[n].query) return false;
  return true;
}

template <typename C>
struct FusedQueries {
  typename C::Shared& shared;
  const Problem& problem;
  const int lane, warp;
  RingIndex<C::kKeyStages> keys;  // block 0 of the pair
  RingIndex<C::kScoreStages> score[2];

  float dq[2][C::kD / 2];  // of even and of odd query blocks

  __device__ void release(std::uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  }

  /// dq += ds K, or dq = ds K.
  __device__ void add(float (&d)[C::kD / 2], int j, bool first, bool last_of_key) {
    const int owner = j == 0 || j == kMaxBlocks - 1 ? 0 : 1;
    RingIndex<C::kScoreStages>& at = score[owner];
    const RingIndex<C::kKeyStages> key = ahead(keys, j);
    const std::uint32_t scores = shared_address(shared.ds[owner][at.stage]);
    const std::uint32_t key_tile = shared_address(shared.k[key.stage]);
    barrier_wait(&shared.key_full[key.stage], key.parity);
    barrier_wait(&shared.ds_full[owner][at.stage], at.parity);
    fence_registers(d);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRows / 16; ++step)
      wgmma<C::kD, Major::mn, Major::mn>(d, C::Scores::by_row(scores, step), C::Rows::by_row(key_tile, step),
                                         !first || step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(d);
    release(&shared.ds_empty[owner][at.stage]);
    if (last_of_key) release(&shared.key_empty[key.stage]);
    at.advance();
  }

  __device__ void store(float (&d)[C::kD / 2], int i, int sequence, int head) {
    const bool leads = warp == 0 && lane == 0;
    scale_all(d, problem.scale);
    if (problem.rope != nullptr) rotate_back<C::kD>(d, problem.rope, i * kRows + warp * 16 + lane / 4, problem.tokens);
    if (leads) store_wait_read<0>();
    named_barrier(3, 128);  // the tile is free
    stage_accumulator<C::kD>(shared.dq, d, 1.f, 1.f);
    named_barrier(3, 128);
    if (leads) C::Rows::store(&problem.maps.dqkv, shared.dq, head * C::kD, i * kRows, sequence);
  }

  template <int n>
  __device__ void product(int sequence, int head) {
    constexpr Product kProduct = kOrder[n];
    if (kProduct.query >= problem.blocks) return;
    float(&d)[C::kD / 2] = dq[kProduct.query % 2];
    add(d, kProduct.key, is_first(n), kProduct.query == problem.blocks - 1);
    if constexpr (is_last(n)) store(d, kProduct.query, sequence, head);
  }

  template <int... n>
  __device__ void products(int sequence, int head, std::integer_sequence<int, n...>) {
    (product<n>(sequence, head), ...);
  }

  __device__ void run() {
    for (int n = static_cast<int>(blockIdx.x); n < problem.pairs; n += static_cast<int>(gridDim.x)) {
      const int pair = problem.pair(n), sequence = pair / problem.heads, head = pair - sequence * problem.heads;
      products(sequence, head, std::make_integer_sequence<int, kProducts>{});
      keys = ahead(keys, problem.blocks);
    }
    if (warp == 0 && lane == 0) store_wait_read<0>();
  }
};

// --- Kernel ---------------------------------------------------------------------------------------------------------

template <typename C>
__global__ __launch_bounds__(C::kThreads, 1) void fused_gradient_kernel(const __grid_constant__ Problem problem) {
  auto& shared = aligned_shared<typename C::Shared>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = warp_index() & 3;
  if (thread == 0) {
    C::init(shared);
    fence_barrier_init();
  }
  __syncthreads();
  if (warp_index() < 8) {
    registers_increase<C::kKeyRegisters>();
    FusedKeys<C> role{shared, problem, lane, warp, warp_index() / 4};
    role.run();
  } else if (warp_index() < 12) {
    registers_decrease<C::kQueryRegisters>();
    FusedQueries<C> role{shared, problem, lane, warp};
    role.run();
  } else {
    registers_decrease<C::kLoadRegisters>();
    if (thread == 384) load_queries<C>(shared, problem);
    if (thread == 416) load_keys<C>(shared, problem);
    if (thread >= 448) compute_statistics<C>(shared, problem, thread - 448);
  }
}

template <typename C>
void launch_fused_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                           cudaStream_t stream) {
  const auto narrow = [](std::int64_t value) { return static_cast<int>(value); };
  const Problem problem{.maps = gradient_maps(shape, rows, args),
                        .lse = args.lse,
                        .rope = args.rope,
                        .tokens = narrow(shape.seq_len),
                        .heads = narrow(shape.heads),
                        .blocks = narrow(padded_tokens(shape) / kRows),
                        .pairs = narrow(rows / shape.seq_len * shape.heads),
                        .scale = score_scale(shape),
                        .order = args.order};
  launch_persistent<typename C::Shared>("attention_dx", fused_gradient_kernel<C>, problem.pairs, C::kThreads, stream,
                                        problem);
}

}  // namespace

bool attention_gradient_fuses(const AttentionShape& shape) {
  return shape.seq_len <= kShortSequence && shape.head_dim <= 64 && shape.heads == shape.kv_heads;
}

void attention_fused_gradient(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                              cudaStream_t stream) {
  if (shape.head_dim == 32)
    launch_fused_gradient<FusedConfig<32>>(shape, rows, args, stream);
  else
    launch_fused_gradient<FusedConfig<64>>(shape, rows, args, stream);
}

}  // namespace kiln::cuda

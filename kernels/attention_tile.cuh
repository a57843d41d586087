#pragma once
#include <algorithm>
#include <cstring>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "ops/attention_shape.h"

/// What the attention kernels share. Each is persistent: one producer warp streams tiles of two operands through a ring
/// in shared memory, and each consumer warpgroup owns 64 rows (queries in forward and dq, keys in dk and dv) whose
/// accumulators stay in registers.
namespace kiln::cuda {

constexpr int kRows = 64;                     // rows of one warpgroup, and of one box of a tensor map
constexpr std::int64_t kShortSequence = 256;  // up to here narrow tiles win: less of them lies beyond the diagonal
constexpr float kLog2e = 1.44269504088896340736f;

// --- Work -----------------------------------------------------------------------------------------------------------

/// Division of 0 <= n < 2^31 by a divisor fixed on the host: n / d = (n m) >> 32 + s with m = ceil(2^(32+s) / d).
struct FastDivide {
  std::uint32_t multiplier = 0, shift = 0;
  int divisor = 1;

  FastDivide() = default;
  explicit FastDivide(int d) : divisor(d) {
    if (d == 1) return;
    while ((2u << shift) < static_cast<std::uint32_t>(d)) ++shift;  // 2^shift < d <= 2^(shift+1)
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (32 + shift)) + static_cast<std::uint32_t>(d) - 1) /
                                            static_cast<std::uint32_t>(d));
  }
  __device__ int operator()(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(static_cast<std::uint32_t>(n), multiplier) >> shift);
  }
};

/// A work item is `tile` of one (sequence, head) pair. Pairs are cut into sections whose streamed operands fit in L2
/// together; within a section the items with most work come first.
struct Schedule {
  int tokens, heads, kv_heads, group;  // T, H, Hkv, H / Hkv
  int tiles, pairs, section, items;
  FastDivide by_section, by_width, by_last_width, by_heads, by_group;  // width: pairs of a section, fewer in the last
  bool last_first;    // the last tile has most work (rows are queries), else the first (rows are keys)
  int last_sequence;  // where sequences are taken in descending order; else -1
};

struct WorkItem {
  int sequence, head, tile;
};

/// Items of `tile_rows` rows: of queries per query head, or of keys per key head.
inline Schedule make_schedule(const AttentionShape& shape, std::int64_t rows, int tile_rows, bool by_query,
                              RowOrder order) {
  const auto narrow = [](std::int64_t value) { return static_cast<int>(value); };
  Schedule s{};
  s.tokens = narrow(shape.seq_len), s.heads = narrow(shape.heads), s.kv_heads = narrow(shape.kv_heads);
  s.group = s.heads / s.kv_heads;
  s.tiles = (s.tokens + tile_rows - 1) / tile_rows;
  s.pairs = narrow(rows / shape.seq_len) * (by_query ? s.heads : s.kv_heads);
  constexpr std::int64_t kSectionBytes = 16 << 20;
  const std::int64_t pair_bytes = 4 * shape.seq_len * shape.head_dim;
  s.section = narrow(std::clamp<std::int64_t>(kSectionBytes / pair_bytes, 1, s.pairs));
  s.items = s.tiles * s.pairs;
  s.by_section = FastDivide(s.tiles * s.section);
  s.by_width = FastDivide(s.section);
  s.by_last_width = FastDivide(s.pairs % s.section == 0 ? s.section : s.pairs % s.section);
  s.by_heads = FastDivide(by_query ? s.heads : s.kv_heads);
  s.by_group = FastDivide(s.group);
  s.last_first = by_query;
  s.last_sequence = order == RowOrder::descending ? narrow(rows / shape.seq_len) - 1 : -1;
  return s;
}

__device__ inline WorkItem work_item(const Schedule& s, int item) {
  const int section = s.by_section(item), rest = item - section * s.by_section.divisor;
  const bool whole = (section + 1) * s.section <= s.pairs;
  const int rank = whole ? s.by_width(rest) : s.by_last_width(rest);
  const int width = whole ? s.by_width.divisor : s.by_last_width.divisor;
  const int pair = section * s.section + rest - rank * width, sequence = s.by_heads(pair);
  return {s.last_sequence < 0 ? sequence : s.last_sequence - sequence, pair - sequence * s.by_heads.divisor,
          s.last_first ? s.tiles - 1 - rank : rank};
}

/// Item of round n of this block; every second round runs backwards over the blocks so that their work evens out.
__device__ inline int scheduled_item(int n) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return n * blocks + ((n & 1) != 0 ? blocks - 1 - block : block);
}

/// The thread's warp. Taken from lane 0, so that the compiler sees one value per warp and keeps what follows from it,
/// the operand descriptors of wgmma before all, in uniform registers.
__device__ inline int warp_index() { return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) >> 5, 0); }

// --- Roles ----------------------------------------------------------------------------------------------------------

/// Threads 0 .. 128 kWarpgroups - 1 consume, and the last warpgroup produces with one thread. Its registers go to the
/// consumers; the sum stays within the block's allotment at launch (65536 / kThreads, rounded down to 8, per thread).
template <int kWarpgroups>
struct Roles {
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;

  __device__ static void become_producer() { registers_decrease<kWarpgroups == 3 ? 32 : 24>(); }
  __device__ static void become_consumer() {
    registers_increase<kWarpgroups == 2 ? 240 : kWarpgroups == 3 ? 160 : 112>();
  }
};

/// The block's dynamic shared memory as a `Shared`, from the first multiple of 1024.
template <typename Shared>
__device__ inline Shared& aligned_shared() {
  extern __shared__ std::uint8_t dynamic_shared[];
  return *reinterpret_cast<Shared*>(dynamic_shared + (-shared_address(dynamic_shared) & 1023));
}

template <int kCount>
__device__ inline void barriers_init(std::uint64_t (&barriers)[kCount], std::uint32_t arrivals) {
  for (std::uint64_t& barrier : barriers) barrier_init(&barrier, arrivals);
}

// --- Tiles in shared memory -----------------------------------------------------------------------------------------

/// Tile [kTileRows, kD] of one head as the copy engine writes it: chunks of up to 64 columns, each kTileRows swizzled
/// rows.
template <int kD, int kTileRows>
struct Tile {
  static constexpr int kChunk = kD < 64 ? kD : 64;
  static constexpr int kSwizzle = 2 * kChunk;  // bytes of a row in a chunk
  static constexpr int kChunkBytes = kTileRows * kSwizzle;
  static constexpr int kBytes = 2 * kTileRows * kD;

  /// Rows row.. of `sequence`, columns column..: those past the sequence read as zeros.
  __device__ static void load(std::uint8_t* tile, const CUtensorMap* map, std::uint64_t* barrier, int column, int row,
                              int sequence) {
#pragma unroll
    for (int c = 0; c < kD / kChunk; ++c)
#pragma unroll
      for (int r = 0; r < kTileRows; r += kRows)
        tensor_load(tile + c * kChunkBytes + r * kSwizzle, map, barrier, column + c * kChunk, row + r, sequence);
  }

  __device__ static void store(const CUtensorMap* map, const std::uint8_t* tile, int column, int row, int sequence) {
#pragma unroll
    for (int c = 0; c < kD / kChunk; ++c) tensor_store(map, tile + c * kChunkBytes, column + c * kChunk, row, sequence);
    store_commit();
  }

  /// Operand with one tile row per m or n, and columns 16 step.. as the reduction index.
  __device__ static std::uint64_t by_column(std::uint32_t tile, int step) {
    constexpr int kSteps = kChunk / 16;
    return operand_descriptor<kSwizzle>(tile) + ((step / kSteps * kChunkBytes + step % kSteps * 32) >> 4);
  }

  /// Operand with one column per m or n, and rows 16 step.. as the reduction index.
  __device__ static std::uint64_t by_row(std::uint32_t tile, int step) {
    return operand_descriptor<kSwizzle>(tile, kChunkBytes) + (step * 16 * kSwizzle >> 4);
  }

  /// Byte of (row, column) in the tile; column is a multiple of 8.
  __device__ static int offset(int row, int column) {
    const int turn = kSwizzle == 128 ? row & 7 : (row >> 1) & 3;
    return column / kChunk * kChunkBytes + row * kSwizzle + ((column % kChunk / 8) ^ turn) * 16;
  }
};

// --- Fragments ------------------------------------------------------------------------------------------------------

/// The lane's row of the 16x16 block of its warp at columns 16 step.., for load_matrix_x4 and store_matrix_x4.
template <int kD>
__device__ inline std::uint32_t fragment_address(const std::uint8_t* tile, int step) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = (static_cast<int>(threadIdx.x) >> 5) & 3;
  return shared_address(tile) + Tile<kD, kRows>::offset(warp * 16 + (lane & 15), step * 16 + (lane >> 4) * 8);
}

/// Register operand of wgmma: columns 16 step.. of the 64 rows of a tile.
template <int kD>
__device__ inline void load_fragment(std::uint32_t (&a)[4], const std::uint8_t* tile, int step) {
  load_matrix_x4(a, fragment_address<kD>(tile, step));
}

__device__ inline std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// An accumulator [64, 2 kCount] as the register operand of the next product, rounded to bf16.
template <int kCount>
__device__ inline void pack_operand(std::uint32_t (&a)[kCount / 8][4], const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

/// The reverse of load_fragment. The copy engine and the tensor cores see it after fence_async_proxy and a barrier.
template <int kD>
__device__ inline void store_fragment(std::uint8_t* tile, const std::uint32_t (&a)[4], int step) {
  store_matrix_x4(fragment_address<kD>(tile, step), a);
}

/// Writes an accumulator [64, kD], scaled, to the warpgroup's tile in bf16, ready for a tensor_store after a barrier.
template <int kD>
__device__ inline void stage_accumulator(std::uint8_t* tile, const float (&d)[kD / 2], float scale0, float scale1) {
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    std::uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = i % 2 == 0 ? scale0 : scale1;
      a[i] = pack_bf16(d[8 * step + 2 * i] * scale, d[8 * step + 2 * i + 1] * scale);
    }
    store_fragment<kD>(tile, a, step);
  }
  fence_async_proxy();
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// --- Host -----------------------------------------------------------------------------------------------------------

/// Map of a row-major matrix [N, columns] as [B, T, columns], in boxes of 64 rows and one chunk of a head.
inline CUtensorMap head_tensor_map(const void* base, const AttentionShape& shape, std::int64_t rows,
                                   std::int64_t columns) {
  const auto width = static_cast<std::uint64_t>(columns), tokens = static_cast<std::uint64_t>(shape.seq_len);
  const std::uint32_t chunk = shape.head_dim < 64 ? 32 : 64;
  return make_tensor_map({.base = base,
                          .sizes = {width, tokens, static_cast<std::uint64_t>(rows) / tokens},
                          .stride_bytes = {2 * width, 2 * width * tokens},
                          .box = {chunk, kRows, 1},
                          .swizzle = chunk == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B});
}

/// Multiprocessors of the current device: the blocks of a persistent kernel.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

/// Launches a kernel whose blocks, at most one per multiprocessor, share `items`.
template <typename Shared, typename... Parameters, typename... Arguments>
void launch_persistent(const char* name, void (*kernel)(Parameters...), int items, int threads, cudaStream_t stream,
                       Arguments... arguments) {
  constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "cudaFuncSetAttribute");
  launch({name, static_cast<unsigned>(std::min(multiprocessors(), items)), static_cast<unsigned>(threads), stream,
          kSharedBytes},
         kernel, arguments...);
}

}  // namespace kiln::cuda

#pragma once
#include <cstddef>

#include "kernels/gemm_hopper_ptx.cuh"
#include "kernels/row_order.h"

/// Tiles of the GEMM of gemm_hopper.cuh: their configurations, the order in which they are taken, and the staging of
/// their output.
namespace kiln::cuda::gemm {

enum class Schedule { turns, shared };
enum class Weights { k_major, pair, n_major };  // B [N,K]; two such arrays of N / 2 rows; B [K,N]
inline constexpr int kDepth = 64;               // k of a stage: a row is one 128-byte swizzle atom
inline constexpr int kThreads = 384;

/// A warpgroup's tile is 64 kFrags x kN; kSlots buffers of kSlotRows x 64 stage its output, kLag stages part the
/// warpgroups of Schedule::shared.
template <int kFragsValue, int kNValue, Schedule kScheduleValue, int kClusterValue, int kStagesValue, int kSlotsValue,
          int kLagValue = 0, int kSlotRows = 64 * kFragsValue>
struct Config {
  static constexpr int kFrags = kFragsValue, kN = kNValue, kStages = kStagesValue, kSlots = kSlotsValue;
  static constexpr int kLag = kLagValue, kCluster = kClusterValue;
  static constexpr bool kTurns = kScheduleValue == Schedule::turns;
  static constexpr int kGroupM = 64 * kFrags;
  static constexpr int kM = kTurns ? kGroupM : 2 * kGroupM;
  static constexpr int kABytes = kM * kDepth * 2, kBBytes = kN * kDepth * 2, kStageBytes = kABytes + kBBytes;
  static constexpr int kSlotBytes = kSlotRows * kDepth * 2;
  static constexpr int kBarriers = 2 * kStages + 8 * kSlots;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kSlots * kSlotBytes + kBarriers * 8;
  static_assert(kCluster == 1 || kCluster == 2);
  static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");
};

/// The configurations of the epilogues that only write. In turns, tiles of 128x128 hide the epilogue entirely but read
/// shared memory and L2 more; wide tiles of 128x256 suit a long k. Pairs load B once for two blocks.
using TurnsPair = Config<2, 128, Schedule::turns, 2, 5, 2>;
using Wide = Config<1, 256, Schedule::shared, 1, 4, 2>;
using WidePair = Config<1, 256, Schedule::shared, 2, 4, 2>;
using WidePairLag = Config<1, 256, Schedule::shared, 2, 4, 2, 2>;

/// Tiles in the order in which clusters take them: bands of `band` rows of tiles, down a column of the band first; from
/// the last row on where `rows_order` descends.
struct TileOrder {
  int rows, columns, band;
  RowOrder rows_order;
  __host__ __device__ int count() const { return rows * columns; }
  __device__ void locate(int tile, int& row, int& column) const {
    const int first = tile / (band * columns) * band, rest = tile % (band * columns);
    const int height = min(band, rows - first);
    row = first + rest % height;
    if (rows_order == RowOrder::descending) row = rows - 1 - row;
    column = rest / height;
  }
};

/// What an epilogue knows of its warpgroup: thread 0..127 of group 0 or 1 and the shared memory it stages output in.
struct Group {
  int id, thread;
  std::byte* slots;
  std::uint64_t* slot_barriers;
  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }
};

/// Where a warpgroup's tile starts: first row and number of the tile column.
struct Place {
  int m, tile_n;
};

/// The sequence of tiles that one warpgroup works on.
template <class C>
struct TileWalk {
  const TileOrder& order;
  int tile, step, rank, group;
  __device__ TileWalk(const TileOrder& o, int group_id)
      : order(o),
        tile(blockIdx.x / C::kCluster + (C::kTurns ? group_id * static_cast<int>(gridDim.x / C::kCluster) : 0)),
        step((C::kTurns ? 2 : 1) * static_cast<int>(gridDim.x / C::kCluster)),
        rank(C::kCluster == 1 ? 0 : static_cast<int>(cluster_rank())),
        group(group_id) {}
  __device__ bool done() const { return tile >= order.count(); }
  __device__ void next() { tile += step; }
  __device__ Place place() const {
    int row, column;
    order.locate(tile, row, column);
    return {(row * C::kCluster + rank) * C::kM + (C::kTurns ? 0 : group * C::kGroupM), column};
  }
};

/// Output staging. Each warp owns a ring of 16-row, 64-column buffers and stores them without waiting for the other
/// warps: fill `buffer()`, then `store`.
template <class C>
struct Staging {
  static constexpr int kBytes = 16 * kDepth * 2, kCount = C::kSlots * C::kSlotBytes / (4 * kBytes);
  const Group& group;
  std::byte* ring;
  int slot = 0;
  __device__ explicit Staging(const Group& g) : group(g), ring(g.slots + g.warp() * kCount * kBytes) {}

  __device__ std::uint32_t buffer() const {
    if (group.lane() == 0) store_wait_read<kCount - 1>();
    __syncwarp();
    return shared_address(ring + slot * kBytes);
  }
  template <Reuse kReuse = Reuse::soon>
  __device__ void store(const CUtensorMap& map, int column, int row) {
    fence_async_proxy();
    __syncwarp();
    if (group.lane() == 0) {
      tensor_store<kReuse>(&map, ring + slot * kBytes, column, row + group.warp() * 16, 0);
      store_commit();
    }
    slot = slot + 1 == kCount ? 0 : slot + 1;
  }
};

/// The lane's address of the 16x16 block at columns 16 column_block of a staging buffer, for load_matrix_x4 and
/// store_matrix_x4: the 8x8 quarters (top left, bottom left, top right, bottom right) are then as the accumulator
/// layout of wgmma has them.
__device__ __forceinline__ std::uint32_t block_address(std::uint32_t buffer, int column_block, int lane) {
  const int row = lane % 16;
  const int chunk = (column_block * 2 + lane / 16) ^ (row & 7);
  return buffer + row * 128 + chunk * 16;
}
/// Puts a block of packed pairs there.
__device__ __forceinline__ void stage_block(std::uint32_t buffer, int column_block, int lane,
                                            const std::uint32_t (&r)[4]) {
  store_matrix_x4(block_address(buffer, column_block, lane), r);
}

/// Rounds a tile of sums to bf16 and stores it with its first column at `column`.
template <class C>
__device__ __forceinline__ void store_tile(const float (&sums)[C::kFrags][C::kN / 2], Staging<C>& staging,
                                           const CUtensorMap& map, int column, int m) {
#pragma unroll
  for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
    for (int part = 0; part < C::kN / 64; ++part) {
      const std::uint32_t buffer = staging.buffer();
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const float* s = &sums[f][part * 32 + block * 8];
        stage_block(buffer, block, staging.group.lane(),
                    {pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7])});
      }
      staging.store(map, column + part * 64, m + f * 64);
    }
}

}  // namespace kiln::cuda::gemm

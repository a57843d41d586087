#pragma once
#include <cstddef>

#include "kernels/gemm_hopper_tile.cuh"

/// A persistent bf16 GEMM for Hopper, D = A B^T with f32 sums, that hands each tile of sums to an epilogue in
/// registers. One warp keeps a ring of shared-memory stages full through the copy engine. Two warpgroups multiply:
/// taking turns at whole tiles, so that the epilogue of one runs under the products of the other (Schedule::turns), or
/// sharing each tile (Schedule::shared). Blocks may work in pairs, clusters of two on neighbouring rows of tiles that
/// load B once for both. Every output element belongs to one thread, which sums over k in one order: results are
/// bitwise reproducible.
namespace kiln::cuda::gemm {

/// An epilogue names how it stores B (kWeights), its kernel arguments (Args) and a Worker<Config> that is made once per
/// warpgroup, with the walk over its tiles, and whose `finish` takes the sums of each tile in turn.
template <class Epilogue>
struct Params {
  CUtensorMap a, b[2];
  TileOrder order;
  int stages_per_tile;
  typename Epilogue::Args epilogue;
};

/// Rows m.. of A and tile column `tile_n` of B at depth k. B comes in halves; of a pair each block loads one for both.
template <class C, class Epilogue>
__device__ __forceinline__ void load_stage(const Params<Epilogue>& p, std::byte* stage, std::uint64_t* full, int m,
                                           int tile_n, int k, int rank) {
  constexpr int kHalfN = C::kN / 2;
  tensor_load(stage, &p.a, full, k, m, 0);
  constexpr bool kTransposed = Epilogue::kWeights == Weights::n_major;
  constexpr int kBoxes = kTransposed ? kHalfN / 64 : 1;  // a transposed box is 64 columns of B by the stage's k
#pragma unroll
  for (int box = 0; box < 2 * kBoxes; ++box) {
    const int half = box / kBoxes;
    if (C::kCluster == 2 && half != rank) continue;
    std::byte* dst = stage + C::kABytes + box * (C::kBBytes / (2 * kBoxes));
    const CUtensorMap* map = Epilogue::kWeights == Weights::pair ? &p.b[half] : &p.b[0];
    const int row = Epilogue::kWeights == Weights::pair ? tile_n * kHalfN : tile_n * C::kN + box * (kHalfN / kBoxes);
    const int x = kTransposed ? row : k, y = kTransposed ? k : row;
    if constexpr (C::kCluster == 2)
      tensor_load_multicast(dst, map, full, x, y, 3);
    else
      tensor_load(dst, map, full, x, y, 0);
  }
}

template <class C, class Epilogue>
__device__ __forceinline__ void produce(const Params<Epilogue>& p, std::byte* stages, std::uint64_t* full,
                                        std::uint64_t* empty) {
  const int clusters = static_cast<int>(gridDim.x) / C::kCluster;
  const int rank = C::kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  RingIndex<C::kStages> ring;
  ring.parity = 1;
  for (int tile = blockIdx.x / C::kCluster; tile < p.order.count(); tile += clusters) {
    int row, column;
    p.order.locate(tile, row, column);
    const int m = (row * C::kCluster + rank) * C::kM;
    for (int s = 0; s < p.stages_per_tile; ++s, ring.advance()) {
      barrier_wait(&empty[ring.stage], ring.parity);
      barrier_expect(&full[ring.stage], C::kStageBytes);
      load_stage<C>(p, stages + ring.stage * C::kStageBytes, &full[ring.stage], m, column, s * kDepth, rank);
    }
  }
}

/// Tells the producers that write into this stage that this warp no longer reads it.
template <class C>
__device__ __forceinline__ void release(std::uint64_t* empty, int lane) {
  if constexpr (C::kCluster == 1) {
    if (lane == 0) barrier_arrive(empty);
  } else {
    if (lane < C::kCluster) barrier_arrive_remote(empty, lane);
  }
}

/// Sums of one tile. The previous stage is released once the products of the next are queued behind it.
template <class C, class Epilogue, class AfterStage>
__device__ __forceinline__ void sum_tile(const Params<Epilogue>& p, float (&sums)[C::kFrags][C::kN / 2],
                                         std::byte* stages, std::uint64_t* full, std::uint64_t* empty,
                                         RingIndex<C::kStages>& ring, const Group& group, AfterStage after_stage) {
  constexpr bool kTransposed = Epilogue::kWeights == Weights::n_major;
  static_assert(!kTransposed || C::kN % 128 == 0, "a transposed half is whole 64-column boxes");
  int previous = 0;
  for (int s = 0; s < p.stages_per_tile; ++s) {
    barrier_wait(&full[ring.stage], ring.parity);
    const std::uint32_t stage = shared_address(stages + ring.stage * C::kStageBytes);
    const std::uint32_t a = stage + (C::kTurns ? 0 : group.id * C::kGroupM * 128), b = stage + C::kABytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const std::uint64_t b_part = operand_descriptor<128>(b + k * (kTransposed ? 16 * 128 : 32), 64 * 128);
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
        wgmma<C::kN, Major::k, kTransposed ? Major::mn : Major::k>(
            sums[f], operand_descriptor<128>(a + f * 64 * 128 + k * 32), b_part, s > 0 || k > 0);
    }
    wgmma_commit();
    if (s > 0) {
      wgmma_wait<1>();
      release<C>(&empty[previous], group.lane());
    }
    previous = ring.stage;
    ring.advance();
    after_stage(s);
  }
  wgmma_wait<0>();
  release<C>(&empty[previous], group.lane());
#pragma unroll
  for (int f = 0; f < C::kFrags; ++f) fence_registers(sums[f]);
}

template <class C, class Epilogue>
__device__ __forceinline__ void consume(const Params<Epilogue>& p, std::byte* stages, std::uint64_t* full,
                                        std::uint64_t* empty, const Group& group) {
  // Named barriers 1 and 2 pass the tensor cores between the groups of Schedule::turns; 1 starts the lag of the other.
  const int other = 1 - group.id;
  RingIndex<C::kStages> ring;
  auto skip = [&](int count) {  // past the stages of a tile that the other group multiplies
    const int at = ring.stage + count;
    ring.parity ^= (at / C::kStages) & 1;
    ring.stage = at % C::kStages;
  };
  TileWalk<C> walk(p.order, group.id);
  typename Epilogue::template Worker<C> worker(p.epilogue, group, walk);
  if (C::kTurns && group.id == 1) {
    named_barrier_arrive(1, 256);
    skip(p.stages_per_tile);
  }
  if (C::kLag > 0 && group.id == 1 && !walk.done()) named_barrier(1, 256);
  bool first = true;
  float sums[C::kFrags][C::kN / 2];
  for (; !walk.done(); walk.next()) {
    if constexpr (C::kTurns) named_barrier(1 + group.id, 256);
    sum_tile<C>(p, sums, stages, full, empty, ring, group, [&](int s) {
      if (C::kTurns && s == p.stages_per_tile - 1) named_barrier_arrive(1 + other, 256);
      if (C::kLag > 0 && group.id == 0 && first && s == min(C::kLag, p.stages_per_tile) - 1)
        named_barrier_arrive(1, 256);
    });
    first = false;
    if constexpr (C::kTurns) skip(p.stages_per_tile);
    worker.finish(sums, walk.place());
  }
  if (group.lane() == 0) store_wait_read<0>();
}

template <class C, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Params<Epilogue> p) {
  extern __shared__ __align__(1024) std::byte shared[];
  std::byte* const slots = shared + C::kStages * C::kStageBytes;
  auto* const full = reinterpret_cast<std::uint64_t*>(slots + 2 * C::kSlots * C::kSlotBytes);
  auto* const empty = full + C::kStages;
  auto* const slot_barriers = empty + C::kStages;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&p.a);
    prefetch_tensor_map(&p.b[0]);
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], (C::kTurns ? 4 : 8) * C::kCluster);
    }
    for (int s = 0; s < 8 * C::kSlots; ++s) barrier_init(&slot_barriers[s], 1);
    fence_barrier_init();
  }
  if constexpr (C::kCluster > 1)
    cluster_sync();
  else
    __syncthreads();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  if (warpgroup == 2) {
    registers_decrease<24>();
    if (threadIdx.x == 256) produce<C>(p, shared, full, empty);
  } else {
    registers_increase<240>();
    const Group group{warpgroup, static_cast<int>(threadIdx.x) % 128, slots + warpgroup * C::kSlots * C::kSlotBytes,
                      slot_barriers + warpgroup * 4 * C::kSlots};
    consume<C>(p, shared, full, empty, group);
  }
  __syncwarp();
  if constexpr (C::kCluster > 1) cluster_sync();  // the other block may still arrive on this block's barriers
}

}  // namespace kiln::cuda::gemm

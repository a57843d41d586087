#pragma once
#include "kernels/hopper.cuh"

/// What the GEMM of gemm_hopper.cuh needs beyond hopper.cuh: clusters, multicast and approximate
/// arithmetic. One function is one PTX instruction unless its comment says more.
namespace kiln::cuda::gemm {

// --- Clusters -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Arrives on the barrier at the same offset in block `rank` of the cluster. Without .cluster scope on purpose: the
/// release of that scope waits for all of the thread's memory traffic, and only reads by the tensor cores, already
/// over, precede it.
__device__ __forceinline__ void barrier_arrive_remote(std::uint64_t* barrier, std::uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

/// Box into the same offset of every block in `mask`, completing on each block's own barrier.
__device__ __forceinline__ void tensor_load_multicast(void* shared, const CUtensorMap* map, std::uint64_t* barrier,
                                                      int x, int y, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(0), "h"(mask)
      : "memory");
}

/// The half of `named_barrier` that does not wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Fragments ------------------------------------------------------------------------------------------------------

/// condition ? a : b as one select: the compiler would turn a chain of these over a register array into an array in
/// local memory.
__device__ __forceinline__ float select(bool condition, float a, float b) {
  float v;
  asm("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\nselp.f32 %0, %2, %3, p;\n}\n"
      : "=f"(v)
      : "r"(static_cast<int>(condition)), "f"(a), "f"(b));
  return v;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

inline constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float sigmoid_approx(float x) { return reciprocal_approx(1.f + exp2_approx(-kLog2e * x)); }

/// Two floats as bf16 (round to nearest even), `low` in the lower half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ float low_bf16(std::uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_bf16(std::uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

}  // namespace kiln::cuda::gemm

#pragma once
#include <cuda_runtime.h>

#include <cstdint>

/// A launch whose blocks all run at the same time and share out one piece of work after another.
namespace kiln::cuda {

class Grid {
 public:
  /// `counter` is zero when the launch starts.
  __device__ explicit Grid(std::uint32_t* counter) : counter_(counter) {}
  __device__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ int blocks() const { return static_cast<int>(gridDim.x); }
  __device__ std::int64_t thread() const { return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
  __device__ std::int64_t threads() const { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

  /// What any block wrote before is seen by all after. The counter only ever grows.
  __device__ void wait() {
    __syncthreads();
    target_ += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
      std::uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter_) : "memory");
      } while (seen < target_);
    }
    __syncthreads();
  }

 private:
  std::uint32_t* counter_;
  std::uint32_t target_ = 0;
};

}  // namespace kiln::cuda

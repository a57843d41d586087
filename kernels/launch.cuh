#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "base/error.h"

namespace kiln::cuda {

/// Turns a failed call into a resource Error that names it.
inline void check_cuda(cudaError_t result, const char* call) {
  if (result != cudaSuccess)
    fail(ExitCode::resource, "CUDA: {} failed: {} ({})", call, cudaGetErrorString(result), cudaGetErrorName(result));
}

#ifdef __CUDACC__
/// How a kernel is launched.
struct Launch {
  const char* name;  // for errors
  dim3 grid, block;
  cudaStream_t stream;
  std::size_t shared_bytes = 0;
};

/// The one door that kernel launches pass; an empty grid launches nothing.
template <typename... Parameters, typename... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return;
  kernel<<<how.grid, how.block, how.shared_bytes, how.stream>>>(Parameters(arguments)...);
  check_cuda(cudaGetLastError(), how.name);
}

#endif

inline unsigned blocks_for(std::int64_t items, std::int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace kiln::cuda

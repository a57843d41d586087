#pragma once
#include <algorithm>
#include <cstddef>
#include <string>

#include "kernels/gemm_hopper.cuh"

/// Host side of gemm_hopper.cuh: tensor maps, checks, the launch.
namespace kiln::cuda::gemm {

/// Map of a row-major bf16 matrix [rows, columns] with rows `stride` elements apart, read or written in boxes of
/// box_rows x 64.
inline CUtensorMap matrix_map(const bf16* base, int rows, int columns, int stride, int box_rows) {
  TensorMapSpec spec;
  spec.base = base;
  spec.sizes[0] = static_cast<std::uint64_t>(columns), spec.sizes[1] = static_cast<std::uint64_t>(rows);
  spec.stride_bytes[0] = static_cast<std::uint64_t>(stride) * 2;
  spec.stride_bytes[1] = spec.stride_bytes[0] * spec.sizes[1];
  spec.box[0] = kDepth, spec.box[1] = static_cast<std::uint32_t>(box_rows);
  return make_tensor_map(spec);
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(ExitCode::resource, std::string(what) + ": " + cudaGetErrorString(status));
}

inline void check_supported(bool supported, const char* name, int m, int n, int k) {
  if (!supported)
    throw Error(ExitCode::usage,
                fmt::format(fmt::runtime("{}: shape [{},{}] with inner size {} is not supported; sizes "
                                         "are positive, and all but the rows divisible by 8"),
                            name, m, n, k));
}

/// Rows of tiles in a band. While B fits in L2 with room to spare, a short band keeps the rows being written close
/// together in device memory; a larger B is read once per band, so the band is tall.
template <class C>
int band_rows(int rows, std::size_t b_bytes) {
  return std::min(rows, b_bytes > (16u << 20) ? 16 : C::kTurns ? 2 : 4);
}

inline int multiprocessors() {
  static const int count = [] {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "gemm: device");
    check_cuda(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device), "gemm: multiprocessors");
    return value;
  }();
  return count;
}

/// Whether narrow tiles fill the last wave of pairs of blocks so much better than wide ones that they finish first.
inline bool wide_tiles_leave_gaps(int m, int n) {
  const auto fill = [&](int width) {
    const int tiles = (m + 255) / 256 * ((n + width - 1) / width), pairs = std::max(1, multiprocessors() / 2);
    return static_cast<double>(tiles) / ((tiles + pairs - 1) / pairs * pairs);
  };
  return fill(128) > 1.04 * fill(256);
}

/// Launches over [m, n], n counting the columns of the product. Fills `p.order`; the maps are the caller's.
template <class C, class Epilogue>
void launch(Params<Epilogue>& p, int m, int n, int k, RowOrder order, cudaStream_t stream) {
  constexpr int kTileM = C::kM * C::kCluster;
  p.order.rows = (m + kTileM - 1) / kTileM;
  p.order.columns = (n + C::kN - 1) / C::kN;
  p.order.band = band_rows<C>(p.order.rows, static_cast<std::size_t>(n) * k * 2);
  p.order.rows_order = order;
  p.stages_per_tile = (k + kDepth - 1) / kDepth;
  check_cuda(
      cudaFuncSetAttribute(gemm_kernel<C, Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
      "gemm: shared memory");
  const int clusters = std::min(p.order.count(), multiprocessors() / C::kCluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * C::kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {C::kCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, gemm_kernel<C, Epilogue>, p), "gemm: launch");
}

}  // namespace kiln::cuda::gemm

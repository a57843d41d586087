#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "core/tensor.h"

namespace kiln::cuda {

/// Eigenvectors of symmetric f64 matrices on the device, by cuSOLVER's divide and conquer (Xsyevd), in its mode of
/// results that repeat bit for bit. Its calls may wait for the device, so that they stand in no graph. One stream; not
/// thread-safe. Errors of the library are resource Errors.
class SymmetricEigen {
 public:
  /// `allocate` is Backend::allocate.
  SymmetricEigen(cudaStream_t stream, std::function<Buffer(std::size_t, std::string_view)> allocate);
  ~SymmetricEigen();
  SymmetricEigen(const SymmetricEigen&) = delete;
  SymmetricEigen& operator=(const SymmetricEigen&) = delete;

  /// Before the first solve() with these sizes: a device tells alone how much the library wants, and what `bytes` do
  /// not hold is allocated here, once for all callers.
  void prepare(std::int64_t n, const double* matrix, const double* values, std::size_t bytes);
  /// Replaces `matrix` [n, n] by its eigenvectors, n numbers each, one after the other by ascending eigenvalue; these
  /// go to `values` [n]. `status` [1], on the device: 0, or a positive number where the iteration did not converge.
  /// `workspace` has `bytes`.
  void solve(std::int64_t n, double* matrix, double* values, int* status, void* workspace, std::size_t bytes);

  /// cuSOLVER's, such as "12.0.4"; needs no device.
  static std::string library_version();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kiln::cuda

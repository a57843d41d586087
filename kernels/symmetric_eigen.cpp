#include "kernels/symmetric_eigen.h"

#include <cusolverDn.h>

#include <utility>
#include <vector>

#include "base/error.h"
#include "kernels/library_version.h"

namespace kiln::cuda {
namespace {

void check_solver(cusolverStatus_t status, const char* call) {
  if (status != CUSOLVER_STATUS_SUCCESS)
    fail(ExitCode::resource, "cuSOLVER: {} failed with status {}", call, static_cast<int>(status));
}

struct DestroyHandle {
  void operator()(cusolverDnHandle_t h) const { cusolverDnDestroy(h); }
};
struct DestroyParameters {
  void operator()(cusolverDnParams_t p) const { cusolverDnDestroyParams(p); }
};

}  // namespace

struct SymmetricEigen::Impl {
  std::function<Buffer(std::size_t, std::string_view)> allocate;
  std::unique_ptr<cusolverDnContext, DestroyHandle> handle;
  std::unique_ptr<cusolverDnParams, DestroyParameters> parameters;
  Buffer more;                  // workspace on the device, where the callers' is too small
  std::vector<std::byte> host;  // and on the host

  struct Need {
    std::size_t device = 0, host = 0;
  };
  Need need(std::int64_t n, const double* matrix, const double* values) const {
    Need bytes;
    check_solver(
        cusolverDnXsyevd_bufferSize(handle.get(), parameters.get(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, n,
                                    CUDA_R_64F, matrix, n, CUDA_R_64F, values, CUDA_R_64F, &bytes.device, &bytes.host),
        "cusolverDnXsyevd_bufferSize");
    return bytes;
  }
};

SymmetricEigen::SymmetricEigen(cudaStream_t stream, std::function<Buffer(std::size_t, std::string_view)> allocate)
    : impl_(std::make_unique<Impl>()) {
  impl_->allocate = std::move(allocate);
  cusolverDnHandle_t handle = nullptr;
  check_solver(cusolverDnCreate(&handle), "cusolverDnCreate");
  impl_->handle.reset(handle);
  check_solver(cusolverDnSetStream(handle, stream), "cusolverDnSetStream");
  check_solver(cusolverDnSetDeterministicMode(handle, CUSOLVER_DETERMINISTIC_RESULTS),
               "cusolverDnSetDeterministicMode");
  cusolverDnParams_t parameters = nullptr;
  check_solver(cusolverDnCreateParams(&parameters), "cusolverDnCreateParams");
  impl_->parameters.reset(parameters);
}

SymmetricEigen::~SymmetricEigen() = default;

void SymmetricEigen::prepare(std::int64_t n, const double* matrix, const double* values, std::size_t bytes) {
  const Impl::Need need = impl_->need(n, matrix, values);
  if (impl_->host.size() < need.host) impl_->host.resize(need.host);
  if (need.device > bytes && need.device > impl_->more.size())
    impl_->more = impl_->allocate(need.device, "workspace of cuSOLVER");
}

void SymmetricEigen::solve(std::int64_t n, double* matrix, double* values, int* status, void* workspace,
                           std::size_t bytes) {
  if (impl_->need(n, matrix, values).device > bytes) {
    workspace = impl_->more.data();
    bytes = impl_->more.size();
  }
  check_solver(cusolverDnXsyevd(impl_->handle.get(), impl_->parameters.get(), CUSOLVER_EIG_MODE_VECTOR,
                                CUBLAS_FILL_MODE_LOWER, n, CUDA_R_64F, matrix, n, CUDA_R_64F, values, CUDA_R_64F,
                                workspace, bytes, impl_->host.data(), impl_->host.size(), status),
               "cusolverDnXsyevd");
}

std::string SymmetricEigen::library_version() {
  return cuda::library_version([](libraryPropertyType which) {
    int number = 0;
    check_solver(cusolverGetProperty(which, &number), "cusolverGetProperty");
    return number;
  });
}

}  // namespace kiln::cuda

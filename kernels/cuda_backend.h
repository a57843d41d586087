#pragma once
#include <memory>
#include <string>
#include <vector>

#include "graph/backend.h"

namespace kiln::cuda {

/// Hopper GPUs that this process may use, which must come first; 0 also when there is no driver.
int device_count();
std::vector<std::string> device_names();
/// Why there is none, for an error message.
std::string why_no_device();

/// A GPU: bf16 kernels on one stream, graph replay, GEMM plans timed once by shape and kept in a file of this rank's. A
/// resource Error when the device cannot be used.
std::unique_ptr<Backend> make_backend(int device, int rank = 0);

/// Groups and workspaces as the GPU has them, without one: what packs a plan for `kiln plan`. Its memory and kernels
/// refuse with a usage Error.
std::unique_ptr<Backend> make_planning_backend();

/// The runtime's, such as "13.0".
std::string runtime_version();
/// Of the libraries that this process loaded, such as "13.1.0".
std::string cublaslt_version();
std::string cusolver_version();

}  // namespace kiln::cuda

#pragma once
#include <memory>

#include "dist/communicator.h"
#include "graph/backend.h"

namespace kiln {

/// Sums tensors of a device over the ranks of `host` with NCCL, on the backend's stream: all_reduce_sum enqueues and
/// does not block, and can be captured. Its other calls are those of `host`. Null when the host's own communicator
/// serves: on the CPU, and with one rank. A usage Error when several ranks use GPUs in a build without NCCL.
std::unique_ptr<Communicator> make_device_communicator(Communicator& host, const Backend& backend);

/// "2.28.3", or "" when built without NCCL.
std::string nccl_version();

}  // namespace kiln

#pragma once
#include <cstddef>

namespace kiln::cuda {

/// Bytes that an array takes in a workspace that is cut into several: up to the next multiple of 256, where any access
/// may begin.
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace kiln::cuda

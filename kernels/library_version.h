#pragma once
#include <fmt/format.h>
#include <library_types.h>

#include <string>

namespace kiln::cuda {

/// "13.1.0" of a library of CUDA's, whose `part_of(libraryPropertyType)` gives one number of the three.
template <typename F>
std::string library_version(F&& part_of) {
  return fmt::format("{}.{}.{}", part_of(MAJOR_VERSION), part_of(MINOR_VERSION), part_of(PATCH_LEVEL));
}

}  // namespace kiln::cuda

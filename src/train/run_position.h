#pragma once
#include <cstdint>

namespace kiln {

/// Where a run stands: everything but the tensors. The data position is one integer, the next sample of the
/// permutation.
struct RunPosition {
  std::int64_t step = 0;      // updates done
  std::int64_t tokens = 0;    // trained on, over all ranks
  std::int64_t position = 0;  // samples drawn
  std::int64_t rescues = 0;   // times that it went on from a merge after a divergence
  bool operator==(const RunPosition&) const = default;
};

}  // namespace kiln

#pragma once

namespace kiln::cuda {

/// Which rows (tokens) a kernel takes first. What the kernel before wrote last is still in L2, so a kernel that begins
/// there reads up to an L2's worth less from device memory. Results do not depend on it.
enum class RowOrder { ascending, descending };

constexpr RowOrder opposite(RowOrder order) {
  return order == RowOrder::ascending ? RowOrder::descending : RowOrder::ascending;
}

}  // namespace kiln::cuda

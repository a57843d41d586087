#pragma once
#include "kernels/context.h"

namespace kiln::cuda {

/// For kernels of a product, alone or first of a pair.
/// error  Error(usage) unless both its operands, the node's first two inputs, are bf16
void check_operands(const Nodes& nodes);

}  // namespace kiln::cuda

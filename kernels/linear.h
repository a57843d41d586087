#pragma once
#include "kernels/context.h"

namespace kiln::cuda {

/// y = x w': x [N,K], w [M,K], y [N,M], all bf16.
Gemm projection(const Tensor& x, const Tensor& w, const Tensor& y);

/// For kernels of a product, alone or first of a pair.
/// error  Error(usage) unless both its operands, the node's first two inputs, are bf16
void check_operands(const Nodes& nodes);

}  // namespace kiln::cuda

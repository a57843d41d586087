#pragma once
#include <span>
#include <string_view>

#include "core/tensor.h"

namespace kiln {

// Shape rules shared by the ops; each throws a usage Error that names the op and shows the shapes.

void expect_inputs(std::string_view op, std::span<const TensorSpec> in, std::size_t count);
void expect_shape(std::string_view op, std::string_view what, const TensorSpec& found, const Shape& expected);
void expect_rank(std::string_view op, std::string_view what, const TensorSpec& found, int rank);
/// f32, f64 or (kernels of a device only) bf16, and the same for all of `specs`.
void expect_same_real(std::string_view op, std::span<const TensorSpec> specs);
void expect_dtype(std::string_view op, std::string_view what, const TensorSpec& found, DType dtype);

}  // namespace kiln

#include "ops/checks.h"

namespace kiln {

void expect_inputs(std::string_view op, std::span<const TensorSpec> in, std::size_t count) {
  check(in.size() == count, "{}: expected {} inputs, found {}", op, count, in.size());
}

void expect_shape(std::string_view op, std::string_view what, const TensorSpec& found, const Shape& expected) {
  check(found.shape == expected, "{}: {} has shape {}, expected {}", op, what, found.shape.str(), expected.str());
}

void expect_rank(std::string_view op, std::string_view what, const TensorSpec& found, int rank) {
  check(found.shape.rank() == rank, "{}: {} has shape {}, expected {} axes", op, what, found.shape.str(), rank);
}

void expect_same_real(std::string_view op, std::span<const TensorSpec> specs) {
  for (const TensorSpec& spec : specs) {
    check(spec.dtype == DType::f32 || spec.dtype == DType::f64 || spec.dtype == DType::bf16,
          "{}: dtype {}, expected f32, f64 or bf16", op, to_string(spec.dtype));
    check(spec.dtype == specs.front().dtype, "{}: inputs of {} and {}", op, to_string(specs.front().dtype),
          to_string(spec.dtype));
  }
}

void expect_dtype(std::string_view op, std::string_view what, const TensorSpec& found, DType dtype) {
  check(found.dtype == dtype, "{}: {} is {}, expected {}", op, what, to_string(found.dtype), to_string(dtype));
}

}  // namespace kiln

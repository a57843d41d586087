#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "base/error.h"

namespace kiln {

enum class DType : std::uint8_t { f32, f64, bf16, f16, i8, u8, u16, i32, u32, i64 };

/// The upper half of an fp32, as stored.
struct bfloat16 {
  std::uint16_t bits;
};
/// IEEE half precision, as stored.
struct float16 {
  std::uint16_t bits;
};

std::size_t size_of(DType dtype);
/// "f32", as in error messages; safetensors' names ("F32") live in io.
std::string_view to_string(DType dtype);

float to_float(bfloat16 value);
/// Round to nearest, ties to even; NaN stays NaN.
bfloat16 to_bfloat16(float value);
float to_float(float16 value);
float16 to_float16(float value);

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>)
    return DType::f32;
  else if constexpr (std::is_same_v<T, double>)
    return DType::f64;
  else if constexpr (std::is_same_v<T, bfloat16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<T, float16>)
    return DType::f16;
  else if constexpr (std::is_same_v<T, std::int8_t>)
    return DType::i8;
  else if constexpr (std::is_same_v<T, std::uint8_t>)
    return DType::u8;
  else if constexpr (std::is_same_v<T, std::uint16_t>)
    return DType::u16;
  else if constexpr (std::is_same_v<T, std::int32_t>)
    return DType::i32;
  else if constexpr (std::is_same_v<T, std::uint32_t>)
    return DType::u32;
  else {
    static_assert(std::is_same_v<T, std::int64_t>);
    return DType::i64;
  }
}

/// What sums of a compute dtype are kept in: f32 for bf16, else the dtype itself.
constexpr DType accumulator_of(DType dtype) { return dtype == DType::bf16 ? DType::f32 : dtype; }

/// The one switch from a dtype to a compute type: `visit_real(dtype, [&]<typename T>() { ... })`, T = float or double.
template <typename F>
decltype(auto) visit_real(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    default:
      break;
  }
  fail(ExitCode::usage, "no CPU kernel for dtype {}: expected f32 or f64", to_string(dtype));
}

}  // namespace kiln

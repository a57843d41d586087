#include "core/weighted_sum.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/error.h"

namespace kiln {
namespace {

/// fp64 to fp32, rounded to odd: a second rounding to 22 bits or fewer then equals one rounding of the fp64
/// (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums").
float round_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || std::isnan(value)) return nearest;
  auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;  // towards zero
  return std::bit_cast<float>(bits | 1u);
}

template <typename T>
T round_to(double value) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return round_to_bfloat16(value);
  else if constexpr (std::is_same_v<T, float16>)
    return round_to_float16(value);
  else
    return static_cast<T>(value);
}

template <typename T>
double to_double(T value) {
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>)
    return static_cast<double>(to_float(value));
  else
    return static_cast<double>(value);
}

/// The switch from a dtype to its storage type.
template <typename F>
decltype(auto) visit_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<bfloat16>();
    case DType::f16:
      return f.template operator()<float16>();
    default:
      break;
  }
  fail(ExitCode::usage, "{} cannot be averaged; use fp32 or bf16", to_string(dtype));
}

template <typename T>
void add_all(const std::byte* source, double weight, std::span<double> sum) {
  for (std::size_t k = 0; k < sum.size(); ++k) {
    T value;
    std::memcpy(&value, source + k * sizeof(T), sizeof(T));
    sum[k] += weight * to_double(value);
  }
}

template <typename T>
bool round_all(std::span<const double> sum, std::byte* out) {
  unsigned faults = 0;  // a branch would keep the loop from vector units
  for (std::size_t k = 0; k < sum.size(); ++k) {
    const T value = round_to<T>(sum[k]);
    faults |= std::isfinite(to_double(value)) ? 0u : 1u;
    std::memcpy(out + k * sizeof(T), &value, sizeof(T));
  }
  return faults == 0;
}

}  // namespace

void add_weighted(std::span<const std::byte> source, DType dtype, double weight, std::span<double> sum) {
  visit_storage(dtype, [&]<typename T>() { add_all<T>(source.data(), weight, sum); });
}

bool round_sum(std::span<const double> sum, DType dtype, std::span<std::byte> out) {
  return visit_storage(dtype, [&]<typename T>() { return round_all<T>(sum, out.data()); });
}

bfloat16 round_to_bfloat16(double value) { return to_bfloat16(round_to_odd(value)); }
float16 round_to_float16(double value) { return to_float16(round_to_odd(value)); }

}  // namespace kiln

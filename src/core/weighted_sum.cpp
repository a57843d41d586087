#include "core/weighted_sum.h"

#include <algorithm>
#include <array>
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

// As many as one AVX-512 register holds; narrower units take them in parts.
constexpr std::size_t kLanes = 8;
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));

template <typename To, typename From>
To load(const std::byte* from) {
  From values;
  std::memcpy(&values, from, sizeof(values));
  return __builtin_convertvector(values, To);
}

/// kLanes elements.
template <typename T>
Doubles load_doubles(const std::byte* from) {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef std::uint32_t Words __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));
  typedef std::uint16_t Halves __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));
  if constexpr (std::is_same_v<T, float>) {
    return load<Doubles, Floats>(from);
  } else if constexpr (std::is_same_v<T, double>) {
    return load<Doubles, Doubles>(from);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const Words bits = load<Words, Halves>(from) << 16;
    return __builtin_convertvector(std::bit_cast<Floats>(bits), Doubles);
  } else {
    Doubles values;
    for (std::size_t j = 0; j < kLanes; ++j) {
      T value;
      std::memcpy(&value, from + j * sizeof(T), sizeof(T));
      values[j] = to_double(value);
    }
    return values;
  }
}

template <typename T>
void sum_all(std::span<const std::byte* const> sources, std::span<const double> weights, std::span<double> sum) {
  constexpr std::size_t kVectors = 4, kStep = kVectors * kLanes;  // sums that do not wait for each other
  std::size_t k = 0;
  for (; k + kStep <= sum.size(); k += kStep) {
    std::array<Doubles, kVectors> totals{};
    for (std::size_t i = 0; i < sources.size(); ++i)
      for (std::size_t v = 0; v < kVectors; ++v)
        totals[v] += weights[i] * load_doubles<T>(sources[i] + (k + v * kLanes) * sizeof(T));
    std::memcpy(&sum[k], totals.data(), sizeof(totals));
  }
  const std::span<double> rest = sum.subspan(k);
  std::ranges::fill(rest, 0.0);
  for (std::size_t i = 0; i < sources.size(); ++i) add_all<T>(sources[i] + k * sizeof(T), weights[i], rest);
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

void weighted_sum(std::span<const std::byte* const> sources, DType dtype, std::span<const double> weights,
                  std::span<double> sum) {
  visit_storage(dtype, [&]<typename T>() { sum_all<T>(sources, weights, sum); });
}

bool round_sum(std::span<const double> sum, DType dtype, std::span<std::byte> out) {
  return visit_storage(dtype, [&]<typename T>() { return round_all<T>(sum, out.data()); });
}

bfloat16 round_to_bfloat16(double value) { return to_bfloat16(round_to_odd(value)); }
float16 round_to_float16(double value) { return to_float16(round_to_odd(value)); }

}  // namespace kiln

#include "core/weighted_sum.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/error.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));

template <typename T>
T load(const std::byte* from) {
  T values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

// One instruction with AVX-512, of which GCC 12 makes four; of its own unmasked form it warns.
#if defined(__AVX512F__)
constexpr __mmask8 kAll = 0xff;
#endif

/// Exact.
Doubles widen(Floats values) {
#if defined(__AVX512F__)
  return std::bit_cast<Doubles>(_mm512_maskz_cvtps_pd(kAll, std::bit_cast<__m256>(values)));
#else
  return __builtin_convertvector(values, Doubles);
#endif
}

/// Rounded to nearest even.
Floats narrow(Doubles values) {
#if defined(__AVX512F__)
  return std::bit_cast<Floats>(_mm512_maskz_cvtpd_ps(kAll, std::bit_cast<__m512d>(values)));
#else
  return __builtin_convertvector(values, Floats);
#endif
}

/// kLanes elements.
template <typename T>
Doubles load_doubles(const std::byte* from) {
  typedef std::uint32_t Words __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));
  typedef std::uint16_t Halves __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));
  if constexpr (std::is_same_v<T, float>) {
    return widen(load<Floats>(from));
  } else if constexpr (std::is_same_v<T, double>) {
    return load<Doubles>(from);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return widen(std::bit_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16));
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

constexpr std::size_t kVectors = 8, kStep = kVectors * kLanes;  // sums that do not wait for each other

/// Calls put(k, sums of elements k to k + kStep - 1) for every whole block of `count`; returns where the rest begins.
template <typename T, typename Put>
std::size_t sum_blocks(std::span<const std::byte* const> sources, std::span<const double> weights, std::size_t count,
                       Put put) {
  std::size_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    std::array<Doubles, kVectors> totals{};
    for (std::size_t i = 0; i < sources.size(); ++i)
      for (std::size_t v = 0; v < kVectors; ++v)
        totals[v] += weights[i] * load_doubles<T>(sources[i] + (k + v * kLanes) * sizeof(T));
    put(k, totals);
  }
  return k;
}

template <typename T>
void sum_rest(std::span<const std::byte* const> sources, std::span<const double> weights, std::size_t first,
              std::span<double> sum) {
  std::ranges::fill(sum, 0.0);
  for (std::size_t i = 0; i < sources.size(); ++i) add_all<T>(sources[i] + first * sizeof(T), weights[i], sum);
}

template <typename T>
void sum_all(std::span<const std::byte* const> sources, std::span<const double> weights, std::span<double> sum) {
  const std::size_t k = sum_blocks<T>(sources, weights, sum.size(), [&](std::size_t at, const auto& totals) {
    std::memcpy(&sum[at], totals.data(), sizeof(totals));
  });
  sum_rest<T>(sources, weights, k, sum.subspan(k));
}

/// In the narrowest type that tells.
template <typename T>
bool is_finite(T value) {
  if constexpr (std::is_same_v<T, float>)
    return std::isfinite(value);
  else
    return std::isfinite(to_double(value));
}

template <typename T>
bool round_all(std::span<const double> sum, std::byte* out) {
  unsigned faults = 0;  // a branch would keep the loop from vector units
  for (std::size_t k = 0; k < sum.size(); ++k) {
    const T value = round_to<T>(sum[k]);
    faults |= is_finite(value) ? 0u : 1u;
    std::memcpy(out + k * sizeof(T), &value, sizeof(T));
  }
  return faults == 0;
}

/// To f32, whose sums need not leave the registers.
template <typename T>
bool sum_and_narrow(std::span<const std::byte* const> sources, std::span<const double> weights, std::size_t count,
                    std::byte* out) {
  Floats faults{};  // stays 0 as long as all results are finite, and is NaN from then on
  const std::size_t k = sum_blocks<T>(sources, weights, count, [&](std::size_t at, const auto& totals) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      const Floats values = narrow(totals[v]);
      faults += values - values;
      std::memcpy(out + (at + v * kLanes) * sizeof(float), &values, sizeof(values));
    }
  });
  bool finite = true;
  for (std::size_t j = 0; j < kLanes; ++j) finite = finite && faults[j] == 0.0f;
  std::array<double, kStep> rest;
  const std::span<double> sum(rest.data(), count - k);
  sum_rest<T>(sources, weights, k, sum);
  return round_all<float>(sum, out + k * sizeof(float)) && finite;
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

bool rounded_sum(std::span<const std::byte* const> sources, DType dtype, std::span<const double> weights,
                 DType rounded_to, std::size_t count, std::span<std::byte> out) {
  if (rounded_to == DType::f32)
    return visit_storage(dtype, [&]<typename T>() { return sum_and_narrow<T>(sources, weights, count, out.data()); });
  constexpr std::size_t kTile = 2048;  // sums that stay in the first-level cache until they are rounded
  std::array<double, kTile> sums;
  std::vector<const std::byte*> from(sources.begin(), sources.end());
  bool finite = true;
  for (std::size_t at = 0; at < count; at += kTile) {
    const std::span<double> sum(sums.data(), std::min(kTile, count - at));
    weighted_sum(from, dtype, weights, sum);
    finite =
        round_sum(sum, rounded_to, out.subspan(at * size_of(rounded_to), sum.size() * size_of(rounded_to))) && finite;
    for (const std::byte*& source : from) source += sum.size() * size_of(dtype);
  }
  return finite;
}

bfloat16 round_to_bfloat16(double value) { return to_bfloat16(round_to_odd(value)); }
float16 round_to_float16(double value) { return to_float16(round_to_odd(value)); }

}  // namespace kiln

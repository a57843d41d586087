#include "merge/average.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace kiln {
namespace {

// Elements summed at a time. Sums and the block that is read stay in the second-level cache (768 KiB for f32), and a
// read is long enough that its system call does not count.
constexpr std::size_t kBlock = 65536;

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

/// sum[k] += weight * source[k]
template <typename T>
void accumulate(const std::byte* source, double weight, std::span<double> sum) {
  for (std::size_t k = 0; k < sum.size(); ++k) {
    T value;
    std::memcpy(&value, source + k * sizeof(T), sizeof(T));
    sum[k] += weight * to_double(value);
  }
}

/// out[k] = round(sum[k]); false when one is not finite.
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

bfloat16 round_to_bfloat16(double value) { return to_bfloat16(round_to_odd(value)); }
float16 round_to_float16(double value) { return to_float16(round_to_odd(value)); }

Averager::Averager() : sums_(kBlock), block_(kBlock * sizeof(double)) {}

bool Averager::average(const Sources& sources, std::span<const double> weights, std::uint64_t first, DType dtype,
                       std::span<std::byte> out) {
  const std::size_t count = out.size() / size_of(dtype);
  const DType input = sources.front().entry->dtype;
  bool finite = true;
  for (std::size_t at = 0; at < count; at += kBlock) {
    const std::span<double> sum(sums_.data(), std::min(kBlock, count - at));
    const std::span<std::byte> block(block_.data(), sum.size() * size_of(input));
    std::fill(sum.begin(), sum.end(), 0.0);
    for (std::size_t i = 0; i < sources.size(); ++i) {
      sources[i].file->read_bytes(*sources[i].entry, (first + at) * size_of(input), block);
      visit_storage(input, [&]<typename T>() { accumulate<T>(block.data(), weights[i], sum); });
    }
    std::byte* const target = out.data() + at * size_of(dtype);
    finite = visit_storage(dtype, [&]<typename T>() { return round_all<T>(sum, target); }) && finite;
  }
  return finite;
}

void fail_not_finite(const Sources& sources, std::uint64_t first, std::uint64_t count, DType dtype) {
  std::vector<double> x(count);
  for (const ModelTensors::Source& source : sources) {
    source.file->read_floats(*source.entry, first, std::span<double>(x));
    const auto bad = std::find_if(x.begin(), x.end(), [](double value) { return !std::isfinite(value); });
    if (bad == x.end()) continue;
    fail(ExitCode::data, "{}: tensor '{}' holds {} at element {}, and finite weights are expected; leave it out",
         source.file->path().string(), source.entry->name, *bad, first + static_cast<std::uint64_t>(bad - x.begin()));
  }
  fail(ExitCode::data, "the average of tensor '{}' overflows {} in elements {} to {}; choose a wider --dtype",
       sources.front().entry->name, to_string(dtype), first, first + count - 1);
}

}  // namespace kiln

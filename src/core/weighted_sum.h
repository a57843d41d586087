#pragma once
#include <cstddef>
#include <span>

#include "core/dtype.h"

namespace kiln {

// The arithmetic of every average of weights: fp64 sums without fused multiply-adds, one rounding at the end. Whoever
// adds the same values in the same order gets the same bits, on any processor.

/// sum[k] += weight * source[k], each product and sum rounded as plain fp64.
///
/// in     source, sum.size() elements of f32, f64, bf16 or f16
/// error  usage: another dtype
void add_weighted(std::span<const std::byte> source, DType dtype, double weight, std::span<double> sum);

/// sum[k] = sum_i weights[i] * sources[i][k]: as add_weighted to zeros for each source in turn, bit for bit. Sums stay
/// in registers, so that several sources at once cost no more than reading them.
///
/// in     each source, sum.size() elements of f32, f64, bf16 or f16    weights, one a source
/// error  usage: another dtype
void weighted_sum(std::span<const std::byte* const> sources, DType dtype, std::span<const double> weights,
                  std::span<double> sum);

/// out[k] = sum[k], rounded once, to nearest even; false when a result is not finite.
///
/// out    sum.size() elements of f32, f64, bf16 or f16
/// error  usage: another dtype
bool round_sum(std::span<const double> sum, DType dtype, std::span<std::byte> out);

/// round_sum of weighted_sum, bit for bit, of `count` elements.
///
/// out    count elements of rounded_to
/// error  usage: another dtype
bool rounded_sum(std::span<const std::byte* const> sources, DType dtype, std::span<const double> weights,
                 DType rounded_to, std::size_t count, std::span<std::byte> out);

/// fp64 to storage with one rounding, to nearest even (through fp32 it would be two). Overflow gives infinity.
bfloat16 round_to_bfloat16(double value);
float16 round_to_float16(double value);

}  // namespace kiln

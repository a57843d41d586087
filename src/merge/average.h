#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "merge/inputs.h"

namespace kiln {

/// One tensor in every checkpoint of a merge, oldest first. All have one shape; their dtypes may differ.
using Sources = std::vector<ModelTensors::Source>;

/// Elements [first, first + count) of a source, where they lie.
std::span<const std::byte> bytes_of(const ModelTensors::Source& source, std::uint64_t first, std::uint64_t count);

/// out[k] = round(sum_i w_i x_i[first + k]): accumulated in fp64, oldest first, without fused multiply-adds, and
/// rounded once, to nearest even. An element's result depends on nothing else.
///
/// in     sources of f32, f64, bf16 or f16, each in its own, read through their maps    weights, one a source
/// out    as many elements of `dtype` (f32, f64, bf16 or f16) as `out` holds bytes for
/// returns false when a result is not finite; fail_not_finite then says why
bool average(const Sources& sources, std::span<const double> weights, std::uint64_t first, DType dtype,
             std::span<std::byte> out);

/// Gives back the memory of inputs that were read, many pieces at a time: each call to the system interrupts all
/// threads.
class InputMemory {
 public:
  /// Call when elements [first, first + count) were read. Thread-safe.
  void done(const Sources& sources, std::uint64_t first, std::uint64_t count);

 private:
  using Extent = std::pair<const std::byte*, const std::byte*>;
  std::mutex mutex_;
  std::map<const SafetensorsReader*, Extent> read_;  // by file, since the last time
  std::uint64_t bytes_ = 0;
};

/// A data Error that names the file and element which made elements [first, first + count) of the average infinite or
/// NaN, or the dtype that they overflow.
[[noreturn]] void fail_not_finite(const Sources& sources, std::uint64_t first, std::uint64_t count, DType dtype);

}  // namespace kiln

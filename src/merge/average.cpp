#include "merge/average.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "core/weighted_sum.h"

namespace kiln {
namespace {

// Elements summed at a time. Sums and the block that is read stay in the second-level cache (768 KiB for f32), and a
// read is long enough that its system call does not count.
constexpr std::size_t kBlock = 65536;

}  // namespace

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
      add_weighted(block, input, weights[i], sum);
    }
    finite = round_sum(sum, dtype, out.subspan(at * size_of(dtype), sum.size() * size_of(dtype))) && finite;
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

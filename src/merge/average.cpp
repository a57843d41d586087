#include "merge/average.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "core/weighted_sum.h"

namespace kiln {
namespace {

// Elements summed at a time; their sums (16 KiB) are rounded out of the first-level cache.
constexpr std::size_t kTile = 2048;
constexpr std::uint64_t kKeptBytes = std::uint64_t{48} << 20;

/// As rounded_sum, of sources that differ in dtype: the same bits as if all were fp64.
bool average_mixed(const Sources& sources, std::span<const double> weights, std::uint64_t first, DType dtype,
                   std::span<std::byte> out) {
  std::array<double, kTile> sums;
  bool finite = true;
  for (std::size_t at = 0, count = out.size() / size_of(dtype); at < count; at += kTile) {
    const std::span<double> sum(sums.data(), std::min(kTile, count - at));
    std::ranges::fill(sum, 0.0);
    for (std::size_t i = 0; i < sources.size(); ++i)
      add_weighted(bytes_of(sources[i], first + at, sum.size()), sources[i].entry->dtype, weights[i], sum);
    finite = round_sum(sum, dtype, out.subspan(at * size_of(dtype), sum.size() * size_of(dtype))) && finite;
  }
  return finite;
}

}  // namespace

std::span<const std::byte> bytes_of(const ModelTensors::Source& source, std::uint64_t first, std::uint64_t count) {
  const std::size_t size = size_of(source.entry->dtype);
  return source.file->bytes(*source.entry).subspan(first * size, count * size);
}

bool average(const Sources& sources, std::span<const double> weights, std::uint64_t first, DType dtype,
             std::span<std::byte> out) {
  const DType input = sources.front().entry->dtype;
  if (std::ranges::any_of(sources, [&](const ModelTensors::Source& s) { return s.entry->dtype != input; }))
    return average_mixed(sources, weights, first, dtype, out);
  const std::size_t count = out.size() / size_of(dtype);
  std::vector<const std::byte*> from;
  for (const ModelTensors::Source& source : sources) from.push_back(bytes_of(source, first, count).data());
  return rounded_sum(from, input, weights, dtype, count, out);
}

void InputMemory::done(const Sources& sources, std::uint64_t first, std::uint64_t count) {
  std::map<const SafetensorsReader*, Extent> free;
  {
    const std::lock_guard lock(mutex_);
    for (const ModelTensors::Source& source : sources) {
      const std::span<const std::byte> bytes = bytes_of(source, first, count);
      const auto [at, added] = read_.try_emplace(source.file, bytes.data(), bytes.data() + bytes.size());
      at->second.first = std::min(at->second.first, bytes.data());
      at->second.second = std::max(at->second.second, bytes.data() + bytes.size());
      bytes_ += bytes.size();
    }
    if (bytes_ < kKeptBytes) return;
    free.swap(read_);
    bytes_ = 0;
  }
  // What another thread is reading in between is mapped again when it goes on.
  for (const auto& [file, extent] : free) file->release({extent.first, extent.second});
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

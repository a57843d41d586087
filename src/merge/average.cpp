#include "merge/average.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "core/weighted_sum.h"

namespace kiln {
namespace {

// Elements summed at a time, straight from the page cache; their sums (16 KiB) are rounded out of the first-level
// cache.
constexpr std::size_t kTile = 2048;

constexpr std::uint64_t kKeptBytes = std::uint64_t{48} << 20;

/// sum[k] = sum_i w_i x_i[k], from where each source stands in `from`: the same bits whether dtypes differ or not.
void add_up(const Sources& sources, std::span<const std::byte* const> from, std::span<const double> weights,
            std::span<double> sum) {
  const DType first = sources.front().entry->dtype;
  if (std::ranges::all_of(sources, [&](const ModelTensors::Source& s) { return s.entry->dtype == first; }))
    return weighted_sum(from, first, weights, sum);
  std::ranges::fill(sum, 0.0);
  for (std::size_t i = 0; i < from.size(); ++i) {
    const DType dtype = sources[i].entry->dtype;
    add_weighted({from[i], sum.size() * size_of(dtype)}, dtype, weights[i], sum);
  }
}

}  // namespace

std::span<const std::byte> bytes_of(const ModelTensors::Source& source, std::uint64_t first, std::uint64_t count) {
  const std::size_t size = size_of(source.entry->dtype);
  return source.file->bytes(*source.entry).subspan(first * size, count * size);
}

bool average(const Sources& sources, std::span<const double> weights, std::uint64_t first, DType dtype,
             std::span<std::byte> out) {
  const std::size_t count = out.size() / size_of(dtype);
  std::vector<const std::byte*> from;
  for (const ModelTensors::Source& source : sources) from.push_back(bytes_of(source, first, count).data());
  std::array<double, kTile> sums;
  bool finite = true;
  for (std::size_t at = 0; at < count; at += kTile) {
    const std::span<double> sum(sums.data(), std::min(kTile, count - at));
    add_up(sources, from, weights, sum);
    finite = round_sum(sum, dtype, out.subspan(at * size_of(dtype), sum.size() * size_of(dtype))) && finite;
    for (std::size_t i = 0; i < from.size(); ++i) from[i] += sum.size() * size_of(sources[i].entry->dtype);
  }
  return finite;
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

#include "core/tensor.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

namespace kiln {

Shape::Shape(std::initializer_list<std::int64_t> sizes) : Shape(std::span(sizes.begin(), sizes.size())) {}

Shape::Shape(std::span<const std::int64_t> sizes) : rank_(static_cast<int>(sizes.size())) {
  check(sizes.size() <= kMaxRank, "a tensor has at most {} axes, found {}", kMaxRank, sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    check(sizes[i] >= 0, "axis {} has the negative size {}", i, sizes[i]);
    sizes_[i] = sizes[i];
  }
}

std::int64_t Shape::numel() const {
  std::int64_t product = 1;
  for (int i = 0; i < rank_; ++i) product *= sizes_[static_cast<std::size_t>(i)];
  return product;
}

std::string Shape::str() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += fmt::format("{}{}", i == 0 ? "" : ",", (*this)[i]);
  return text += "]";
}

Tensor Tensor::rows(std::int64_t first, std::int64_t count) const {
  check(spec.shape.rank() >= 1 && first >= 0 && count >= 0 && first + count <= spec.shape[0],
        "rows [{}, {}) of a tensor {}", first, first + count, spec.shape.str());
  std::array<std::int64_t, Shape::kMaxRank> sizes{count};
  for (int i = 1; i < spec.shape.rank(); ++i) sizes[static_cast<std::size_t>(i)] = spec.shape[i];
  const Shape shape(std::span<const std::int64_t>(sizes.data(), static_cast<std::size_t>(spec.shape.rank())));
  const std::int64_t row = spec.shape[0] == 0 ? 0 : spec.shape.numel() / spec.shape[0];
  auto* begin = static_cast<std::byte*>(data) + static_cast<std::size_t>(first * row) * size_of(spec.dtype);
  return {begin, {shape, spec.dtype}};
}

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20, kLarge = 2 * kHugePage;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Buffer::Buffer(std::size_t bytes, std::string_view what) : size_(bytes) {
  // Large buffers ask for huge pages: rows of logits or of an arena lie further apart than the TLB reaches otherwise.
  constexpr std::size_t kLine = 64;
  const bool large = bytes >= kLarge;
  const std::size_t alignment = large ? kHugePage : kLine;
  const std::size_t rounded = rounded_up(bytes, alignment);
  if (rounded == 0) return;
  data_ = std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)),
                                           Free{[](std::byte* p) noexcept { std::free(p); }});
  if (!data_)
    fail(ExitCode::resource, "out of memory: {} of {} bytes; use a smaller model or micro-batch", what, bytes);
  if (large) ::madvise(data_.get(), rounded, MADV_HUGEPAGE);  // a hint; without it only speed is lost
  zero();
}

void Buffer::zero() const {
  // Pages given back read as zeros, and take no memory until they are written: whole ones of a large buffer.
  if (size_ >= kLarge && ::madvise(data(), rounded_up(size_, kHugePage), MADV_DONTNEED) == 0) return;
  if (size_ > 0) std::memset(data(), 0, size_);
}

}  // namespace kiln

#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace kiln {

/// Up to four sizes, outermost first. Trivially copyable.
class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> sizes);
  explicit Shape(std::span<const std::int64_t> sizes);

  int rank() const { return rank_; }
  std::int64_t operator[](int axis) const { return sizes_[static_cast<std::size_t>(axis)]; }
  std::int64_t numel() const;
  /// As files write it.
  std::vector<std::int64_t> sizes() const { return {sizes_.begin(), sizes_.begin() + rank_}; }
  bool operator==(const Shape& other) const = default;
  /// "[2,3]"
  std::string str() const;

 private:
  std::array<std::int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

/// What a tensor is, without where it is.
struct TensorSpec {
  Shape shape;
  DType dtype = DType::f32;
  std::size_t bytes() const { return static_cast<std::size_t>(shape.numel()) * size_of(dtype); }
  bool operator==(const TensorSpec&) const = default;
};

/// A contiguous row-major view that borrows its memory (host or device). Trivially copyable; a Buffer or Arena owns.
struct Tensor {
  void* data = nullptr;
  TensorSpec spec;

  const Shape& shape() const { return spec.shape; }
  DType dtype() const { return spec.dtype; }
  std::int64_t numel() const { return spec.shape.numel(); }
  std::size_t bytes() const { return spec.bytes(); }

  /// Typed access; a usage Error when T is not the tensor's dtype.
  template <typename T>
  T* as() const {
    check(dtype_of<T>() == spec.dtype, "tensor of {} read as {}", to_string(spec.dtype), to_string(dtype_of<T>()));
    return static_cast<T*>(data);
  }
  template <typename T>
  std::span<T> span() const {
    return {as<T>(), static_cast<std::size_t>(numel())};
  }
  /// Rows [first, first + count) of the outermost axis, still contiguous.
  Tensor rows(std::int64_t first, std::int64_t count) const;
};
static_assert(std::is_trivially_copyable_v<Tensor>);

/// Owns memory: of the host, 64-byte aligned and zeroed, or what a device handed over. Move-only.
class Buffer {
 public:
  using Release = void (*)(std::byte*) noexcept;
  Buffer() = default;
  /// Host memory. A resource Error names `what` and the size when memory runs out.
  explicit Buffer(std::size_t bytes, std::string_view what = "buffer");
  /// Takes over memory that `release` frees.
  Buffer(std::byte* data, std::size_t bytes, Release release) : data_(data, Free{release}), size_(bytes) {}
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  /// Zeros it. Host memory alone; a large buffer then takes none of it until it is written again.
  void zero() const;

 private:
  struct Free {
    Release release;
    void operator()(std::byte* p) const { release(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

/// A tensor with its own memory: what tests, golden values and host-side tools use.
class HostTensor {
 public:
  HostTensor() = default;
  explicit HostTensor(TensorSpec spec, std::string_view what = "tensor") : buffer_(spec.bytes(), what), spec_(spec) {}
  Tensor view() const { return {buffer_.data(), spec_}; }
  void zero() const { buffer_.zero(); }
  template <typename T>
  std::span<T> span() const {
    return view().span<T>();
  }

 private:
  Buffer buffer_;
  TensorSpec spec_;
};

}  // namespace kiln

#pragma once
#include <bit>
#include <vector>

#include "base/rng.h"
#include "graph/backend.h"

namespace kiln::test {

/// A tensor of a backend with what the host gave it.
class DeviceArray {
 public:
  DeviceArray(Backend& backend, TensorSpec spec)
      : backend_(backend), buffer_(backend.allocate(spec.bytes(), "test")), spec_(spec) {}
  Tensor view() const { return {buffer_.data(), spec_}; }
  template <typename T>
  void set(const std::vector<T>& values) const {
    backend_.upload(view(), values.data());
  }
  template <typename T>
  std::vector<T> get() const {
    std::vector<T> values(static_cast<std::size_t>(spec_.shape.numel()));
    backend_.download(values.data(), view());
    return values;
  }

 private:
  Backend& backend_;
  Buffer buffer_;
  TensorSpec spec_;
};

inline std::vector<float> normals(std::int64_t count, std::uint64_t seed, double scale) {
  const Philox random(seed, stream_of("normals"));
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i)
    values.push_back(static_cast<float>(scale * random.normal(static_cast<std::uint64_t>(i))));
  return values;
}

struct Halves {
  std::vector<std::uint16_t> high, low;
};
inline Halves split(const std::vector<float>& values) {
  Halves halves;
  for (const float value : values) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    halves.high.push_back(static_cast<std::uint16_t>((bits + 0x8000u) >> 16));
    halves.low.push_back(static_cast<std::uint16_t>(bits));
  }
  return halves;
}
inline std::vector<float> joined(const std::vector<bfloat16>& high, const std::vector<std::uint16_t>& low) {
  std::vector<float> values;
  for (std::size_t i = 0; i < high.size(); ++i) {
    const auto rest = static_cast<std::uint32_t>(static_cast<std::int16_t>(low[i]));
    values.push_back(std::bit_cast<float>((static_cast<std::uint32_t>(high[i].bits) << 16) + rest));
  }
  return values;
}

}  // namespace kiln::test

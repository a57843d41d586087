#include <atomic>
#include <bit>
#include <cmath>

#include "catch.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace kiln {
namespace {

TEST_CASE("every bf16 and f16 pattern survives the way to f32 and back") {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto pattern = static_cast<std::uint16_t>(bits);
    const float wide = to_float(bfloat16{pattern}), half = to_float(float16{pattern});
    if (std::isnan(wide))
      CHECK(std::isnan(to_float(to_bfloat16(wide))));
    else
      CHECK(to_bfloat16(wide).bits == pattern);
    if (std::isnan(half))
      CHECK(std::isnan(to_float(to_float16(half))));
    else
      CHECK(to_float16(half).bits == pattern);
  }
}

TEST_CASE("rounding is to the nearest, ties to even") {
  CHECK(to_bfloat16(1.0f + 0x1p-8f).bits == 0x3f80);  // a tie, down to even
  CHECK(to_bfloat16(1.0f + 0x3p-8f).bits == 0x3f82);  // a tie, up to even
  CHECK(to_bfloat16(1.0f + 0x1p-8f + 0x1p-20f).bits == 0x3f81);
  CHECK(to_float16(1.0f + 0x1p-11f).bits == 0x3c00);
  CHECK(to_float16(1.0f + 0x3p-11f).bits == 0x3c02);
  CHECK(to_float16(65519.0f).bits == 0x7bff);
  CHECK(to_float16(65520.0f).bits == 0x7c00);
  CHECK(to_float16(0x1p-25f).bits == 0);
  CHECK(to_float16(0x1.8p-24f).bits == 2);
  CHECK(to_float16(-1e10f).bits == 0xfc00);
}

TEST_CASE("shapes and views check their bounds") {
  const Shape shape{2, 3};
  CHECK(shape.numel() == 6);
  CHECK(shape.str() == "[2,3]");
  CHECK(shape.sizes() == std::vector<std::int64_t>{2, 3});
  CHECK(Shape{}.numel() == 1);
  CHECK_THROWS_AS((Shape{1, 2, 3, 4, 5}), Error);
  CHECK_THROWS_AS((Shape{-1}), Error);
  HostTensor tensor({{4, 3}, DType::f32});
  for (std::size_t i = 0; i < 12; ++i) tensor.span<float>()[i] = static_cast<float>(i);
  const Tensor rows = tensor.view().rows(1, 2);
  CHECK(rows.shape() == Shape{2, 3});
  CHECK(rows.as<float>()[0] == 3.0f);
  CHECK_THROWS_WITH(tensor.view().rows(3, 2), ContainsSubstring("rows [3, 5) of a tensor [4,3]"));
  CHECK_THROWS_WITH(tensor.view().as<double>(), ContainsSubstring("tensor of f32 read as f64"));
}

TEST_CASE("buffers are zeroed and aligned, large ones too") {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{100}, std::size_t{9} << 20}) {
    const Buffer buffer(bytes);
    CHECK(std::bit_cast<std::uintptr_t>(buffer.data()) % 64 == 0);
    const auto zeroed = [&] {
      return std::all_of(buffer.data(), buffer.data() + bytes, [](std::byte b) { return b == std::byte{0}; });
    };
    CHECK(zeroed());
    std::fill(buffer.data(), buffer.data() + bytes, std::byte{7});
    buffer.zero();
    CHECK(zeroed());
  }
}

TEST_CASE("parallel_for covers each index once, whatever the threads") {
  const int threads = thread_count();
  for (const int count : {1, 2, 5}) {
    set_thread_count(count);
    for (const std::int64_t size : {0, 1, 7, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(size));
      parallel_for(size, 3, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)]++;
      });
      CHECK(std::all_of(seen.begin(), seen.end(), [](const std::atomic<int>& n) { return n == 1; }));
    }
  }
  set_thread_count(threads);
}

}  // namespace
}  // namespace kiln

#include "core/weighted_sum.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "catch.h"

using namespace kiln;

namespace {

/// Bytes of `count` values of a dtype at an odd address, as tensors of a file may lie; among them what rounds badly.
struct Source {
  std::vector<std::byte> storage;
  const std::byte* bytes() const { return storage.data() + 1; }

  Source(DType dtype, std::size_t count, std::uint64_t stream) : storage(1 + count * size_of(dtype)) {
    const Philox random(7, stream);
    std::vector<double> values(count);
    for (std::size_t k = 0; k < count; ++k) values[k] = random.normal(k) * std::exp2(static_cast<int>(k % 24) - 12);
    if (count > 5) values[2] = 0.0, values[3] = -0.0, values[4] = 1e-7, values[5] = 60000.0;
    round_sum(values, dtype, std::span(storage).subspan(1));
  }
};

}  // namespace

TEST_CASE("a sum of several sources has the bits of one source after the other") {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const std::size_t count : {0, 1, 7, 31, 32, 33, 64, 1000, 2048})
      for (const std::size_t sources : {1, 2, 3, 10}) {
        INFO(to_string(dtype) << ", " << count << " elements of " << sources);
        std::vector<Source> made;
        std::vector<const std::byte*> from;
        std::vector<double> weights;
        for (std::size_t i = 0; i < sources; ++i) made.emplace_back(dtype, count, i);
        for (std::size_t i = 0; i < sources; ++i) {
          from.push_back(made[i].bytes());
          weights.push_back(i % 3 == 1 ? -0.1 : 1.0 / (3.0 + static_cast<double>(i)));
        }
        std::vector<double> expected(count, 0.0), sum(count, std::nan(""));
        for (std::size_t i = 0; i < sources; ++i)
          add_weighted({from[i], count * size_of(dtype)}, dtype, weights[i], expected);
        weighted_sum(from, dtype, weights, sum);
        if (count > 0) CHECK(std::memcmp(sum.data(), expected.data(), count * sizeof(double)) == 0);
        for (const DType rounded_to : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
          std::vector<std::byte> twice(count * size_of(rounded_to)), once(twice.size());
          const bool finite = round_sum(expected, rounded_to, twice);
          CHECK(rounded_sum(from, dtype, weights, rounded_to, count, once) == finite);
          CHECK(once == twice);
        }
      }
}

TEST_CASE("a rounded sum tells a result that is not finite wherever it stands") {
  for (const DType rounded_to : {DType::f32, DType::bf16})
    for (const float fault : {INFINITY, -INFINITY, std::nanf("")})
      for (const std::size_t at : {0, 63, 64, 4095, 4100}) {
        std::vector<float> a(4101, 1.0f), b(4101, 2.0f);
        const std::vector<const std::byte*> from{std::as_bytes(std::span(a)).data(),
                                                 std::as_bytes(std::span(b)).data()};
        const std::vector<double> weights{0.5, 0.5};
        std::vector<std::byte> out(a.size() * size_of(rounded_to));
        CHECK(rounded_sum(from, DType::f32, weights, rounded_to, a.size(), out));
        b[at] = fault;
        CHECK_FALSE(rounded_sum(from, DType::f32, weights, rounded_to, a.size(), out));
      }
  // Finite in fp64, and not in f32.
  const std::vector<double> wide(70, 1e300);
  const std::byte* const from = std::as_bytes(std::span(wide)).data();
  const double one = 1.0;
  std::vector<float> out(wide.size());
  CHECK_FALSE(rounded_sum(std::span(&from, 1), DType::f64, std::span(&one, 1), DType::f32, wide.size(),
                          std::as_writable_bytes(std::span(out))));
}

TEST_CASE("a sum keeps what is not finite, and refuses integers") {
  const std::vector<float> a(40, INFINITY), b(40, -INFINITY);
  const std::vector<const std::byte*> from{std::as_bytes(std::span(a)).data(), std::as_bytes(std::span(b)).data()};
  const std::vector<double> weights{0.5, 0.5};
  std::vector<double> sum(40);
  weighted_sum(from, DType::f32, weights, sum);
  for (const double value : sum) CHECK(std::isnan(value));
  weighted_sum(std::span(from).first(1), DType::f32, weights, sum);
  for (const double value : sum) CHECK(std::isinf(value));
  CHECK_THROWS_WITH(weighted_sum(from, DType::i32, weights, sum), ContainsSubstring("cannot be averaged"));
}

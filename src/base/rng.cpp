#include "base/rng.h"

#include <cmath>
#include <numbers>

namespace kiln {

std::array<std::uint32_t, 4> Philox::block(std::uint64_t n) const {
  constexpr std::uint64_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  std::array<std::uint32_t, 4> c{low(n), high(n), low(stream_), high(stream_)};
  std::uint32_t key0 = low(seed_), key1 = high(seed_);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = kMul0 * c[0], p1 = kMul1 * c[2];
    c = {high(p1) ^ c[1] ^ key0, low(p1), high(p0) ^ c[3] ^ key1, low(p0)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

std::uint64_t Philox::bits(std::uint64_t n) const {
  const auto words = block(n);
  return (static_cast<std::uint64_t>(words[1]) << 32) | words[0];
}

double Philox::uniform(std::uint64_t n) const { return static_cast<double>(bits(n) >> 11) * 0x1.0p-53; }

double Philox::normal(std::uint64_t n) const {
  const auto words = block(n);
  const std::uint64_t a = (static_cast<std::uint64_t>(words[1]) << 32) | words[0];
  const std::uint64_t b = (static_cast<std::uint64_t>(words[3]) << 32) | words[2];
  const double u = (static_cast<double>(a >> 11) + 1.0) * 0x1.0p-53;  // (0, 1], so that log is finite
  const double v = static_cast<double>(b >> 11) * 0x1.0p-53;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

std::uint64_t stream_of(const char* name) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (; *name != '\0'; ++name) hash = (hash ^ static_cast<unsigned char>(*name)) * 0x100000001b3u;
  return hash;
}

}  // namespace kiln

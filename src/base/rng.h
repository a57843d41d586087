#pragma once
#include <array>
#include <cstdint>

namespace kiln {

/// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
/// Stateless: the n-th draw of a stream is a pure function of (seed, stream, n), so nothing has to be saved to resume.
class Philox {
 public:
  /// `stream` separates independent uses of one seed (a tensor, an epoch, a rank-free purpose).
  Philox(std::uint64_t seed, std::uint64_t stream) : seed_(seed), stream_(stream) {}

  /// Four words of 32 uniform bits at counter `n`.
  std::array<std::uint32_t, 4> block(std::uint64_t n) const;
  /// 64 uniform bits, the n-th.
  std::uint64_t bits(std::uint64_t n) const;
  /// Uniform in [0, 1), 53 bits.
  double uniform(std::uint64_t n) const;
  /// Standard normal (Box-Muller), the n-th.
  double normal(std::uint64_t n) const;

 private:
  std::uint64_t seed_, stream_;
};

/// A stream number from a name (FNV-1a), so that a tensor's draws do not depend on the order of creation.
std::uint64_t stream_of(const char* name);

}  // namespace kiln

#pragma once
#include <algorithm>

#include "core/parallel.h"
#include "optim/state_codec.h"

namespace kiln {

/// Adam's two moments of one tensor in one step, decoded and encoded in blocks.
template <typename T>
struct MomentViews {
  StateView<T> first, second;

  /// Calls body(first, count, m, v) for blocks of at most kStateBlock elements, in parallel, and stores what it leaves
  /// in m and v.
  template <typename Body>
  void for_blocks(Body&& body) const {
    const std::int64_t n = first.numel();
    parallel_for((n + kStateBlock - 1) / kStateBlock, kStateGrain, [&](std::int64_t begin, std::int64_t end) {
      T m_buffer[kStateBlock], v_buffer[kStateBlock];
      for (std::int64_t at = begin * kStateBlock; at < std::min(end * kStateBlock, n); at += kStateBlock) {
        const std::int64_t count = std::min(kStateBlock, n - at);
        T* m = first.load(at, count, m_buffer);
        T* v = second.load(at, count, v_buffer);
        body(at, count, m, v);
        first.store(at, count, m);
        second.store(at, count, v);
      }
    });
  }
};

/// Adam's two moments of one tensor, as they are stored: PREFIXexp_avg and PREFIXexp_avg_sq.
class Moments {
 public:
  struct Options {
    double beta1, beta2, eps;
    StatePrecision precision = StatePrecision::fp32;
    std::uint64_t seed = 1;
  };
  Moments(const Parameter& parameter, const Shape& shape, const Options& options, const std::string& prefix = "");
  void append_specs(std::vector<StateSpec>& list) const;
  /// Takes their tensors off the front of `states`.
  template <typename T>
  MomentViews<T> views(std::span<const Tensor>& states, std::int64_t step) const {
    const StateView<T> first = first_.view<T>(states, step);
    return {first, second_.view<T>(states, step)};
  }
  /// m <- b1 m + (1-b1) g,  v <- b2 v + (1-b2) g^2,  direction = m / (sqrt(v) / root + eps). All [numel]; the direction
  /// may overwrite the gradient. Root 1 has no bias correction; PyTorch's form has sqrt(1-b2^t).
  template <typename T>
  void advance(const MomentViews<T>& views, const T* gradient, T* direction, double root = 1.0) const;
  /// lr sqrt(1-b2^t) / (1-b1^t): the bias correction as a factor of the step, in GaLore's form of Adam.
  double rate(double lr, double step) const;
  const Options& options() const { return options_; }

 private:
  Options options_;
  StateStore first_, second_;
};

}  // namespace kiln

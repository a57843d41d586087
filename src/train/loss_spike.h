#pragma once
#include <array>
#include <cstddef>

namespace kiln {

/// Tells a spike of the training loss: a loss above `factor` times the median of the last 64 that were none, once there
/// are 16. A spike is not remembered, nor is a loss that is not finite, so that neither can hide the next one.
class LossSpike {
 public:
  explicit LossSpike(double factor) : factor_(factor) {}
  /// Whether `loss` is a spike; otherwise remembers it. False for one that is not finite. Never allocates.
  bool operator()(double loss);
  /// Of the losses remembered; 0 while there are fewer than 16.
  double median() const;

 private:
  static constexpr std::size_t kLosses = 64, kLeast = 16;
  double factor_;
  std::array<double, kLosses> losses_{};  // a ring
  std::size_t count_ = 0;                 // ever remembered
};

}  // namespace kiln

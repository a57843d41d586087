#include "train/loss_spike.h"

#include <algorithm>
#include <cmath>

namespace kiln {

double LossSpike::median() const {
  if (count_ < kLeast) return 0;
  std::array<double, kLosses> sorted = losses_;
  const auto size = static_cast<std::ptrdiff_t>(std::min(count_, kLosses));
  std::nth_element(sorted.begin(), sorted.begin() + size / 2, sorted.begin() + size);
  return sorted[static_cast<std::size_t>(size / 2)];
}

bool LossSpike::operator()(double loss) {
  if (!std::isfinite(loss)) return false;
  if (count_ >= kLeast && loss > factor_ * median()) return true;
  losses_[count_++ % kLosses] = loss;
  return false;
}

}  // namespace kiln

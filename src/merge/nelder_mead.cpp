#include "merge/nelder_mead.h"

#include <algorithm>
#include <cmath>

namespace kiln {
namespace {

/// from + share * (to - from)
std::vector<double> along(const std::vector<double>& from, const std::vector<double>& to, double share) {
  std::vector<double> x(from.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = from[i] + share * (to[i] - from[i]);
  return x;
}

/// Of all corners but the last.
std::vector<double> centre_of(const std::vector<Minimum>& simplex) {
  std::vector<double> centre(simplex.front().x.size(), 0.0);
  for (std::size_t k = 0; k + 1 < simplex.size(); ++k)
    for (std::size_t i = 0; i < centre.size(); ++i)
      centre[i] += simplex[k].x[i] / static_cast<double>(simplex.size() - 1);
  return centre;
}

}  // namespace

Minimum nelder_mead(const std::function<double(const std::vector<double>&)>& f, const std::vector<double>& start,
                    double first_step, int evaluations) {
  const auto at = [&](std::vector<double> x) {
    --evaluations;
    const double value = f(x);
    return Minimum{std::move(x), std::isnan(value) ? INFINITY : value};
  };
  const double n = static_cast<double>(start.size());
  const double expansion = 1 + 2 / n, contraction = 0.75 - 0.5 / n, shrinkage = 1 - 1 / n;
  std::vector<Minimum> simplex{at(start)};
  for (std::size_t i = 0; i < start.size(); ++i) {
    std::vector<double> x = start;
    x[i] += first_step;
    simplex.push_back(at(x));
  }
  while (true) {
    std::stable_sort(simplex.begin(), simplex.end(), [](auto& a, auto& b) { return a.value < b.value; });
    Minimum& worst = simplex.back();
    const Minimum& best = simplex.front();
    if (evaluations <= 0 || worst.value - best.value <= 1e-12 * std::abs(best.value)) return best;
    const std::vector<double> centre = centre_of(simplex);
    const Minimum reflected = at(along(centre, worst.x, -1));
    if (reflected.value < best.value) {
      const Minimum expanded = at(along(centre, worst.x, -expansion));
      worst = expanded.value < reflected.value ? expanded : reflected;
    } else if (reflected.value < simplex[simplex.size() - 2].value) {
      worst = reflected;
    } else {
      const bool outside = reflected.value < worst.value;
      const Minimum contracted = at(along(centre, worst.x, outside ? -contraction : contraction));
      if (contracted.value < std::min(reflected.value, worst.value)) {
        worst = contracted;
      } else {
        for (std::size_t k = 1; k < simplex.size(); ++k) simplex[k] = at(along(best.x, simplex[k].x, shrinkage));
      }
    }
  }
}

}  // namespace kiln

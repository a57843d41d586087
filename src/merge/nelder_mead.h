#pragma once
#include <functional>
#include <vector>

namespace kiln {

struct Minimum {
  std::vector<double> x;
  double value = 0;
};

/// A local minimum of `f` from `start`, by the simplex method without derivatives, with coefficients that adapt to the
/// dimension (Nelder & Mead 1965; Gao & Han 2012). Stops when the values of the simplex agree to 1e-12 relative, or
/// after `evaluations`. `f` may return infinity where it is not defined. Deterministic.
Minimum nelder_mead(const std::function<double(const std::vector<double>&)>& f, const std::vector<double>& start,
                    double first_step, int evaluations);

}  // namespace kiln

#include "optim/moments.h"

#include <cmath>

namespace kiln {

Moments::Moments(const Parameter& parameter, const Shape& shape, const Options& options, const std::string& prefix)
    : options_(options),
      first_(parameter,
             {.name = prefix + "exp_avg", .shape = shape, .precision = options.precision, .seed = options.seed}),
      second_(parameter, {.name = prefix + "exp_avg_sq",
                          .shape = shape,
                          .precision = options.precision,
                          .values = StateValues::positive,
                          .seed = options.seed}) {}

void Moments::append_specs(std::vector<StateSpec>& list) const {
  first_.append_specs(list);
  second_.append_specs(list);
}

template <typename T>
void Moments::advance(const MomentViews<T>& views, const T* gradient, T* direction, double root) const {
  const T b1 = static_cast<T>(options_.beta1), b2 = static_cast<T>(options_.beta2), eps = static_cast<T>(options_.eps);
  const T c1 = static_cast<T>(1.0 - options_.beta1), c2 = static_cast<T>(1.0 - options_.beta2);
  const T divisor = static_cast<T>(root);
  views.for_blocks([=](std::int64_t first, std::int64_t count, T* m, T* v) {
    const T* g = gradient + first;
    T* n = direction + first;
    for (std::int64_t i = 0; i < count; ++i) {
      const T x = g[i];
      m[i] = b1 * m[i] + c1 * x;
      v[i] = b2 * v[i] + c2 * x * x;
      n[i] = m[i] / (std::sqrt(v[i]) / divisor + eps);
    }
  });
}

double Moments::rate(double lr, double step) const {
  return lr * std::sqrt(1.0 - std::pow(options_.beta2, step)) / (1.0 - std::pow(options_.beta1, step));
}

template void Moments::advance(const MomentViews<float>&, const float*, float*, double) const;
template void Moments::advance(const MomentViews<double>&, const double*, double*, double) const;

}  // namespace kiln

#include "optim/adam.h"

#include <cmath>

#include "base/rng.h"
#include "core/parallel.h"

namespace kiln {
namespace {

class AdamW final : public Optimizer {
 public:
  explicit AdamW(const OptimizerOptions& o)
      : options_{.beta1 = o.beta1,
                 .beta2 = o.beta2,
                 .eps = o.eps,
                 .weight_decay = o.weight_decay,
                 .form = AdamForm::pytorch,
                 .seed = o.seed} {}
  std::string_view name() const override { return "adamw"; }
  std::vector<StateSpec> states(const Parameter& parameter) const override { return AdamUpdate::states(parameter); }
  OpPtr update_op(const Parameter& parameter) const override {
    return std::make_shared<AdamUpdate>(parameter, options_);
  }

 private:
  AdamUpdate::Options options_;
};

/// Of one step, in the weights' type.
template <typename T>
struct Coefficients {
  T b1, b2, c1, c2, eps, clip, root, rate, before, after;
};

/// By value and without aliases: the compiler vectorises it, and the loop runs at the speed of memory.
template <typename T>
void update_range(const Coefficients<T> c, std::int64_t n, const T* __restrict g, T* __restrict w, T* __restrict m,
                  T* __restrict v) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T x = c.clip * g[i];
    m[i] = c.b1 * m[i] + c.c1 * x;
    v[i] = c.b2 * v[i] + c.c2 * x * x;
    w[i] = c.after * (c.before * w[i] - c.rate * m[i] / (std::sqrt(v[i]) / c.root + c.eps));
  }
}

}  // namespace

std::vector<StateSpec> AdamUpdate::states(const Parameter& parameter) {
  const TensorSpec spec{parameter.shape, DType::f32};
  return {{"exp_avg", spec}, {"exp_avg_sq", spec}};
}

std::uint64_t AdamUpdate::stream() const { return stream_of(parameter().name.c_str()); }

Cost AdamUpdate::cost(std::span<const TensorSpec>) const {
  const double n = static_cast<double>(parameter().shape.numel());
  return {12.0 * n, 28.0 * n};
}

void AdamUpdate::update(const UpdateArgs& args) const {
  const double step = scalar(args.scalars, Scalar::step), lr = scalar(args.scalars, Scalar::lr);
  const double correction1 = 1.0 - std::pow(options_.beta1, step), correction2 = 1.0 - std::pow(options_.beta2, step);
  const double decay = parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0;
  const bool pytorch = options_.form == AdamForm::pytorch;
  visit_real(args.w.dtype(), [&]<typename T>() {
    const Coefficients<T> coefficients{
        .b1 = static_cast<T>(options_.beta1),
        .b2 = static_cast<T>(options_.beta2),
        .c1 = static_cast<T>(1.0 - options_.beta1),
        .c2 = static_cast<T>(1.0 - options_.beta2),
        .eps = static_cast<T>(options_.eps),
        .clip = static_cast<T>(scalar(args.scalars, Scalar::clip_scale)),
        .root = static_cast<T>(pytorch ? std::sqrt(correction2) : 1.0),
        .rate = static_cast<T>(pytorch ? lr / correction1 : lr * std::sqrt(correction2) / correction1),
        .before = static_cast<T>(pytorch ? decay : 1.0),
        .after = static_cast<T>(pytorch ? 1.0 : decay)};
    T* w = args.w.as<T>();
    const T* g = args.g.as<T>();
    T* m = args.states[0].as<T>();
    T* v = args.states[1].as<T>();
    parallel_for(args.w.numel(), 1 << 14, [&](std::int64_t begin, std::int64_t end) {
      update_range(coefficients, end - begin, g + begin, w + begin, m + begin, v + begin);
    });
  });
}

std::unique_ptr<Optimizer> make_adamw(const OptimizerOptions& options) { return std::make_unique<AdamW>(options); }

}  // namespace kiln

#include "optim/adam.h"

#include <cmath>

#include "base/rng.h"

namespace kiln {
namespace {

class AdamW final : public Optimizer {
 public:
  explicit AdamW(const OptimizerOptions& o)
      : options_(adam_options(o, AdamForm::pytorch, o.states)), name_(to_string(o.kind)) {}
  std::string_view name() const override { return name_; }
  std::vector<StateSpec> states(const Parameter& parameter) const override {
    return AdamUpdate::states(parameter, options_);
  }
  OpPtr update_op(const Parameter& parameter) const override {
    return std::make_shared<AdamUpdate>(parameter, options_);
  }

 private:
  AdamUpdate::Options options_;
  std::string_view name_;
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

Moments moments_of(const Parameter& parameter, StatePrecision precision, const AdamUpdate::Options& o) {
  return Moments(parameter, parameter.shape,
                 {.beta1 = o.beta1,
                  .beta2 = o.beta2,
                  .eps = o.eps,
                  .precision = stored_precision(parameter, precision),
                  .seed = o.seed});
}

}  // namespace

AdamUpdate::AdamUpdate(Parameter parameter, const Options& options)
    : UpdateOp(std::move(parameter)),
      options_(options),
      moments_(moments_of(this->parameter(), options.states, options)) {}

std::vector<StateSpec> AdamUpdate::states(const Parameter& parameter, StatePrecision precision) {
  std::vector<StateSpec> list;
  moments_of(parameter, precision, {}).append_specs(list);
  return list;
}

std::uint64_t AdamUpdate::stream() const { return stream_of(parameter().name.c_str()); }

Cost AdamUpdate::cost(std::span<const TensorSpec>) const {
  const double n = static_cast<double>(parameter().shape.numel());
  double bytes = 12.0 * n;  // w twice and g
  for (const StateSpec& state : state_specs()) bytes += 2.0 * static_cast<double>(state.spec.bytes());
  return {12.0 * n, bytes};
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
    std::span<const Tensor> states = args.states;
    moments_.views<T>(states, static_cast<std::int64_t>(step))
        .for_blocks([&](std::int64_t first, std::int64_t count, T* m, T* v) {
          update_range(coefficients, count, g + first, w + first, m, v);
        });
  });
}

AdamUpdate::Options adam_options(const OptimizerOptions& o, AdamForm form, StatePrecision states) {
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .form = form,
          .seed = o.seed,
          .states = states};
}

std::unique_ptr<Optimizer> make_adamw(const OptimizerOptions& options) { return std::make_unique<AdamW>(options); }

}  // namespace kiln

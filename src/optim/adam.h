#pragma once
#include "optim/moments.h"

namespace kiln {

/// Two published forms of Adam with decoupled decay; they differ in where eps and the decay enter.
enum class AdamForm {
  pytorch,  // w *= 1 - lr wd;  w -= lr/(1-b1^t) m / (sqrt(v/(1-b2^t)) + eps)
  galore,   // w -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + eps);  w *= 1 - lr wd
};

/// Adam on one whole parameter; states exp_avg and exp_avg_sq, each as w, stored as state_codec.h says.
///
/// floor  reads w, g, m, v and writes w, m, v: 28 bytes a parameter in f32, and as many with bf16 weights and masters;
///        20 with bf16 states, 16 with int8 ones
/// paper  Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101
class AdamUpdate final : public UpdateOp {
 public:
  struct Options {
    double beta1, beta2, eps, weight_decay;
    AdamForm form;
    std::uint64_t seed = 1;                        // of stochastic rounding, where weights or states are bf16
    StatePrecision states = StatePrecision::fp32;  // vectors have fp32 instead of int8
  };
  AdamUpdate(Parameter parameter, const Options& options);
  /// Codes and scales are other tensors than moments, so a device has another kernel for them.
  std::string_view name() const override {
    return stored_precision(parameter(), options_.states) == StatePrecision::int8 ? "adam8bit_update" : "adam_update";
  }
  Cost cost(std::span<const TensorSpec> in) const override;
  static std::vector<StateSpec> states(const Parameter& parameter, StatePrecision precision = StatePrecision::fp32);
  static std::vector<StateSpec> states(const Parameter& parameter, const Options& options) {
    return states(parameter, options.states);
  }
  const Options& options() const { return options_; }
  /// Of stochastic rounding: draws are a function of (seed, step, parameter, element).
  std::uint64_t stream() const;

 protected:
  void update(const UpdateArgs& args) const override;
  std::vector<StateSpec> state_specs() const override { return states(parameter(), options_); }

 private:
  Options options_;
  Moments moments_;
};

/// Of a member that updates some parameters by Adam.
AdamUpdate::Options adam_options(const OptimizerOptions& options, AdamForm form, StatePrecision states);

/// AdamW in PyTorch's form, on every parameter; `adam8bit` is the same with int8 states.
std::unique_ptr<Optimizer> make_adamw(const OptimizerOptions& options);

}  // namespace kiln

#pragma once
#include "optim/low_rank.h"

namespace kiln {

/// LoRA as an update rule of one matrix W [m,n]: training is confined to W = W_0 + s B A, and W stays merged.
///
/// With G the gradient at the merged W, the chain rule gives dB = s G A' and dA = s B' G. Adam (PyTorch's form,
/// decoupled decay) moves A and B, and W follows by s (dB A_new + B_old dA) = s (B_new A_new - B_old A_old), here with
/// dA, dB the changes. So losses, A and B are those of LoRA with adapters of its own, in exact arithmetic: the forward
/// pass of x W_0' + s (x A') B' is x W', and W_0 is never needed. It saves Adam's states, not the gradient, which is
/// whole. The global norm that clips is that of whole gradients. s = alpha / r; A ~ U(-1/sqrt(n), 1/sqrt(n)) from
/// Philox(seed, stream_of(NAME) + epoch).uniform(e), B = 0, drawn at step 1; n, and e in rows of n, without a device's
/// padding.
///
/// ReLoRA (restart): at each refresh (projector.h) after the first, A is drawn anew and B is 0, so that what was learnt
/// stays in W and a new subspace opens. Of both moments the 1 % with the largest second moments are kept, the rest is
/// 0; the authors prune each by its own magnitudes, which can leave a first moment without its second. The rate of
/// these matrices then rises from lr/rewarm to lr in `rewarm` steps.
///
/// states lora_a [r,n], lora_b [m,r] f32; lora_a_exp_avg, lora_a_exp_avg_sq, lora_b_exp_avg, lora_b_exp_avg_sq
///        (state_codec.h)
/// paper  LoRA: Hu et al. 2021, arXiv:2106.09685. ReLoRA: Lialin et al. 2023, arXiv:2307.05695
class LoraUpdate final : public UpdateOp {
 public:
  struct Options {
    double beta1, beta2, eps, weight_decay;
    std::int64_t rank;
    double alpha;
    bool restart;
    std::int64_t refresh;
    bool stagger;
    std::int64_t rewarm;
    std::uint64_t seed;
    StatePrecision states = StatePrecision::fp32;
  };
  LoraUpdate(Parameter parameter, const Options& options);
  std::string_view name() const override { return "lora_update"; }
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  static std::vector<StateSpec> states(const Parameter& parameter, const Options& options);
  const Options& options() const { return options_; }
  RefreshSchedule schedule() const { return refresh_schedule(parameter(), options_.refresh, options_.stagger); }
  /// Whether A is drawn at this step.
  bool draws(std::int64_t step) const { return options_.restart ? refresh_due(schedule(), step) : step == 1; }
  /// Factor on the learning rate after a restart, in (0, 1].
  double rewarmed(std::int64_t step) const;

 protected:
  void update(const UpdateArgs& args) const override;
  std::vector<StateSpec> state_specs() const override { return states(parameter(), options_); }

 private:
  template <typename T>
  void update_as(const UpdateArgs& args) const;
  /// A drawn, B zero, moments zero at step 1 and pruned afterwards; scratch as large as the larger of A and B.
  template <typename T>
  void start(std::int64_t step, T* a, T* b, const MomentViews<T>& of_a, const MomentViews<T>& of_b, T* scratch) const;

  Options options_;
  LowRankShape at_;
  Moments of_a_, of_b_;
};

/// Of the moments, at a restart.
inline constexpr double kLoraPruned = 0.99;

/// LoRA or ReLoRA on the layers' linear weights, AdamW (PyTorch's form) on the rest.
std::unique_ptr<Optimizer> make_lora(const OptimizerOptions& options);

}  // namespace kiln

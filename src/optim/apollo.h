#pragma once
#include "optim/low_rank.h"

namespace kiln {

enum class ApolloFactor { vector, tensor };

/// APOLLO on one matrix W [m,n]: the gradient itself, scaled by what Adam would do in a random subspace.
///
/// R = G P (right side; G' P on the left) [max(m,n), r] with P [min(m,n), r] ~ N(0, 1/r), N = m/(sqrt(v)+eps) its Adam
/// direction, and one factor a vector (a row on the right side, a column on the left) or one for the tensor (Mini):
///   phi = ||N|| / (||R|| + 1e-8)
///   W -= lr_t sqrt(alpha) limit(phi G),   lr_t = lr sqrt(1-b2^t)/(1-b1^t)
/// with Fira's norm-growth limiter on phi G; the decay W *= 1 - lr wd comes last, as in GaLore. Moments are kept when P
/// changes, as in the authors' code.
///
/// P is regenerated each step and never stored: element e (row-major) is
/// Philox(seed, stream_of(NAME) + epoch).normal(e) / sqrt(r), epoch the number of refreshes so far (projector.h).
/// states exp_avg, exp_avg_sq [max(m,n), r] (state_codec.h), limiter_norm [1] (0: none yet). The paper counts 2nr + 2:
/// its
///        second number is the seed of P, which here follows from the run's seed and the parameter's name
/// floor  20 bytes a parameter in f32: G for R and its norms, then for the pass that reads and writes W
/// paper  Zhu et al. 2024, arXiv:2412.05270: APOLLO has alpha 1; APOLLO-Mini rank 1, one factor and alpha 128
class ApolloUpdate final : public UpdateOp {
 public:
  struct Options {
    double beta1, beta2, eps, weight_decay;
    std::int64_t rank;
    double alpha;
    std::int64_t refresh;
    bool stagger;
    ApolloFactor factor;
    double gamma;
    std::uint64_t seed;
    StatePrecision states = StatePrecision::fp32;
  };
  ApolloUpdate(Parameter parameter, const Options& options);
  std::string_view name() const override { return "apollo_update"; }
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  static std::vector<StateSpec> states(const Parameter& parameter, const Options& options);
  const Options& options() const { return options_; }
  RefreshSchedule schedule() const { return refresh_schedule(parameter(), options_.refresh, options_.stagger); }
  /// Philox's stream of P at a step.
  std::uint64_t projection_stream(std::int64_t step) const;

 protected:
  void update(const UpdateArgs& args) const override;
  std::vector<StateSpec> state_specs() const override { return states(parameter(), options_); }

 private:
  template <typename T>
  struct Scratch;
  template <typename T>
  void update_as(const UpdateArgs& args) const;
  template <typename T>
  void make_phi(const UpdateArgs& args, const Scratch<T>& scratch, double clip, T& previous) const;

  Options options_;
  LowRankShape at_;
  Moments moments_;
};

/// APOLLO or APOLLO-Mini on the layers' linear weights, Adam (GaLore's form) on the rest.
std::unique_ptr<Optimizer> make_apollo(const OptimizerOptions& options);

}  // namespace kiln

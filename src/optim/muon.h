#pragma once
#include "optim/low_rank.h"

namespace kiln {

/// Momentum, then the nearest matrix with singular values about 1, on one matrix W [m,n].
///
///   B <- mu B + G,   U = G + mu B (Nesterov),   X = U / (||U|| + 1e-7), transposed where m > n
///   five times  A = X X',  X <- a X + (b A + c A A) X,   (a, b, c) = (3.4445, -4.7750, 2.0315)
///   W <- (1 - lr wd) W - lr scale X
/// The iteration (Newton-Schulz) brings singular values into about [0.7, 1.2] and keeps the singular vectors. The scale
/// is 0.2 sqrt(max(m,n)) (match_rms: entries as large as Adam's steps, so that one learning rate serves both) or
/// sqrt(max(1, m/n)) (spectral: steps of one spectral norm).
///
/// states momentum [m,n] (state_codec.h)
/// paper  Jordan et al. 2024, kellerjordan.github.io/posts/muon; match_rms: Liu et al. 2025, arXiv:2502.16982
class MuonUpdate final : public UpdateOp {
 public:
  struct Options {
    double momentum, weight_decay;
    MuonScale scale;
    std::uint64_t seed;
    StatePrecision states = StatePrecision::fp32;
  };
  MuonUpdate(Parameter parameter, const Options& options);
  std::string_view name() const override { return "muon_update"; }
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  static std::vector<StateSpec> states(const Parameter& parameter, const Options& options);
  const Options& options() const { return options_; }
  /// What the orthogonalised momentum is multiplied by, before the learning rate. Padding counts for nothing.
  double scale() const;

 protected:
  void update(const UpdateArgs& args) const override;
  std::vector<StateSpec> state_specs() const override { return states(parameter(), options_); }

 private:
  template <typename T>
  void update_as(const UpdateArgs& args) const;

  Options options_;
  StateStore momentum_;
};

/// Coefficients a, b, c of the iteration, and how often it is done.
inline constexpr double kNewtonSchulz[3] = {3.4445, -4.7750, 2.0315};
inline constexpr int kNewtonSchulzSteps = 5;

/// Five Newton-Schulz steps on x [m,n] in place, m <= n, after division by its norm; scratch of [m,n] and 2 [m,m].
template <typename T>
void orthogonalise(std::int64_t m, std::int64_t n, T* x, T* copy, T* grams);

/// Muon on the layers' linear weights, AdamW (PyTorch's form) on the rest.
std::unique_ptr<Optimizer> make_muon(const OptimizerOptions& options);

}  // namespace kiln

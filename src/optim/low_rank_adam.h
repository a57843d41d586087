#pragma once
#include "optim/low_rank.h"

namespace kiln {

/// What happens to the part of the gradient outside the subspace.
enum class Residual {
  none,    // dropped: GaLore
  scaled,  // scaled by the subspace's own step and limited in growth: Fira
};

/// Adam in a rank-r subspace of the gradient of one matrix, W [m,n].
///
/// With Q the basis of the shorter side (projector.h), R the projected gradient, N = m/(sqrt(v)+eps) its Adam direction
/// and phi = ||N||/(||R||+1e-8) along the rank axis, one factor a row (right side) or a column (left side):
///   GaLore           W -= lr_t alpha N Q'
///   Fira, paper      W -= lr_t alpha (N Q' + S),   S = limit(phi (G - R Q'))
///   Fira, reference  W -= lr_t (alpha N Q' + S),   S = limit(phi (G - alpha R Q'))
/// (on the left side G and W are read as their transposes), lr_t = lr sqrt(1-b2^t)/(1-b1^t). The limiter divides S by
/// max(||S||/(prev+1e-8), gamma)/gamma and keeps prev = ||S|| after the division; its first step only stores.
/// Rows of the residual are orthogonal to Q, so ||S_i||^2 = phi_i^2 (||G_i||^2 - (2k-k^2)||R_i||^2) with k = 1 or alpha
/// needs no S, and the update is one skinny GEMM onto W and one pass.
///
/// With `rotate` (the project's Fira+) the moments follow the basis at a warm refresh. With C = Q_old' Q_new,
///   m <- m C,   v <- (1-b2^(t-1)) |(v^ - m^^2) (C*C) + (m^ C)^2|,   m^ = m/(1-b1^(t-1)), v^ = v/(1-b2^(t-1)),
/// squares and C*C element by element: the variance turns with the squares of C, the mean with C, as in LDAdam.
///
/// states projector [min(m,n),r], exp_avg and exp_avg_sq [max(m,n),r] on either side, so that the r numbers of a row or
///        column lie together, each as state_codec.h stores it, and for Fira limiter_norm [1] (0: none yet). A
///        projector that is not fp32 is rounded to nearest, and used as it is stored; the identity above then holds as
///        far as it is orthonormal
/// floor  24 bytes a parameter in f32 and 4 m n r FLOPs: G read for R and its norms, then for the pass; W read and
///        written by the GEMM and by the pass. The CPU kernel reads G once more for the norms: 28. GaLore: 12
/// paper  GaLore: Zhao et al. 2024, arXiv:2403.03507. Fira: Chen et al. 2024, arXiv:2410.01623. LDAdam: Robert et al.
///        2024, arXiv:2410.16103
class LowRankAdamUpdate final : public UpdateOp {
 public:
  struct Options {
    double beta1, beta2, eps, weight_decay;
    std::int64_t rank;
    double alpha;
    std::int64_t refresh;
    bool stagger;
    ProjectorKind projector;
    Residual residual;
    FiraVariant variant;
    double gamma;
    std::uint64_t seed;
    StatePrecision states = StatePrecision::fp32, projector_states = StatePrecision::fp32;
    bool rotate = false;  // moments into the new basis at a refresh
  };
  LowRankAdamUpdate(Parameter parameter, const Options& options);
  std::string_view name() const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  static std::vector<StateSpec> states(const Parameter& parameter, const Options& options);
  const Options& options() const { return options_; }
  /// When this matrix is refreshed.
  RefreshSchedule schedule() const { return refresh_schedule(parameter(), options_.refresh, options_.stagger); }

 protected:
  void update(const UpdateArgs& args) const override;
  std::vector<StateSpec> state_specs() const override { return states(parameter(), options_); }

 private:
  template <typename T>
  struct Scratch;
  template <typename T>
  void update_as(const UpdateArgs& args) const;
  /// The basis of this step [min(m,n),r], after a refresh where one is due.
  template <typename T>
  const T* basis(const UpdateArgs& args, const StateView<T>& stored, const MomentViews<T>& moments,
                 const Scratch<T>& scratch) const;
  template <typename T>
  void rotate(const T* from, const T* to, double steps_done, const MomentViews<T>& moments,
              const Scratch<T>& scratch) const;
  /// scratch.phi: phi over the limiter's divisor.
  template <typename T>
  void make_phi(const UpdateArgs& args, const Scratch<T>& scratch, double clip, T& previous) const;

  Options options_;
  LowRankShape at_;
  StateStore projector_;
  Moments moments_;
};

/// What a rotation adds to the step where it draws the random bits of moments that it rounds: apart from those of the
/// same step's update.
inline constexpr std::int64_t kRotationStep = std::int64_t{1} << 40;

/// GaLore, Fira or Fira+ on the layers' linear weights, Adam (GaLore's form) on the rest; with Fira+ its states of
/// embedding and head are int8.
std::unique_ptr<Optimizer> make_low_rank_adam(const OptimizerOptions& options);

}  // namespace kiln

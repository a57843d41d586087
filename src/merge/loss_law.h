#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kiln {

/// A loss curve and the learning rates behind it.
struct LossCurve {
  std::vector<double> lr;          // of steps 1, 2, ...; a branch repeats its trunk's
  std::vector<std::int64_t> step;  // of each loss, ascending, each within lr
  std::vector<double> loss;        // nats
};

/// Laws of the loss under any learning-rate schedule. With S1 the sum of rates, and drops counted after warm-up:
enum class LossLaw {
  /// L = L0 + A S1^-alpha - C S2, S2 = sum m_i, m_i = lambda m_(i-1) + (lr_(i-1) - lr_i) (Tissue et al. 2024,
  /// arXiv:2408.11029)
  mtl,
  /// L = L0 + A S1^-alpha - B sum_k (lr_(k-1) - lr_k) (1 - (1 + C lr_k^-gamma S_k)^-beta), S_k the rates from step k
  /// on (Luo et al. 2025, arXiv:2503.12811)
  mpl,
};
std::string_view to_string(LossLaw law);

struct LossLawFit {
  LossLaw law = LossLaw::mtl;
  bool knows_decay = false;               // a curve fell after warm-up; otherwise the last term was never seen
  double peak_lr = 1;                     // rates are divided by it, so the constants are in peak steps
  double l0 = 0, a = 0, decay_scale = 0;  // decay_scale: C of MTL, B of MPL
  double alpha = 1;
  std::array<double, 3> decay{};  // MTL: lambda; MPL: C, beta, gamma
  double rms_log_error = 0;       // over the points of the fit
};

/// Fits one law to curves of one model and data, which share all constants: Huber loss (1e-3) on log loss; the three
/// scales by non-negative, reweighted least squares within a multi-start simplex search over the exponents. Warm-up and
/// the tenth of a curve after its start are left out, noise is averaged in at most 200 blocks a curve. Deterministic.
/// A usage Error for no curve, or fewer than 8 losses after that.
LossLawFit fit_loss_law(LossLaw law, std::span<const LossCurve> curves);

/// The law's loss after the last of `lr`, rates of steps 1, 2, ...
double predict_loss(const LossLawFit& fit, std::span<const double> lr);

}  // namespace kiln

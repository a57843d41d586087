#pragma once
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "base/decay_shape.h"

namespace kiln {

/// How N checkpoints, oldest first, share the weight of their average ("Model Merging in Pre-training of Large
/// Language Models", arXiv:2505.12082). The paper's recursion and closed form of the EMA differ, so both have a name.
enum class MergeMethod {
  sma,         ///< w_i = 1/N
  wma,         ///< w_i proportional to i, i = 1 oldest
  ema,         ///< M(i) = a M_i + (1-a) M(i-1), M(1) = M_1: the oldest keeps (1-a)^(N-1)
  ema_closed,  ///< w_i = a (1-a)^(N-i); sums to 1 - (1-a)^N unless normalised
  schedule,    ///< the weights that replay a learning-rate decay (weights_of_decay)
  qam,         ///< the same decay, corrected for gradients that change with the weights (qam_weights)
  custom,      ///< given weights
};

/// "sma", "ema-closed", ... as on the command line; a usage Error lists what exists.
std::string_view to_string(MergeMethod method);
MergeMethod parse_merge_method(std::string_view name);

struct WeightOptions {
  MergeMethod method = MergeMethod::sma;
  double alpha = 0.1;                     // ema, ema_closed: (0, 1]
  DecayShape shape = DecayShape::linear;  // schedule, qam
  double final_ratio = 0.0;               // schedule, qam: [0, 1), where the decay ends
  std::vector<double> decay = {};         // schedule, qam: N - 1 factors instead of a shape
  std::vector<double> custom = {};        // custom: N weights, oldest first
  bool normalise = true;                  // ema_closed, custom: divide by the sum
};

/// The weights of `count` checkpoints, oldest first. They sum to 1 unless `normalise` is off.
/// A usage Error for a count of 0, an alpha or ratio out of range, a list of the wrong length, a weight that is not
/// finite, or a sum that is not positive.
std::vector<double> merge_weights(const WeightOptions& options, std::size_t count);

/// Factors of `updates` recorded updates under a shape: entry j - 1 is shape(j / (updates + 1)). Linear to zero gives
/// the weights of SMA.
std::vector<double> decay_factors(DecayShape shape, std::size_t updates, double final_ratio = 0.0);

/// A decay as checkpoint weights (WSM, arXiv:2507.17634). Checkpoints M_0 .. M_n have recorded updates
/// u_j = M_j - M_(j-1); M_0 + sum_j w_j u_j = sum_k c_k M_k with c_n = w_n, c_j = w_j - w_(j+1), c_0 = 1 - w_1.
/// in     decay [n], 1 >= w_1 >= ... >= w_n >= 0
/// out    weights [n + 1], oldest first, non-negative, sum 1
/// error  usage: a factor that is out of range or above its predecessor
std::vector<double> weights_of_decay(std::span<const double> decay);

/// The inverse: w_j = sum of c_k over k >= j.
/// in     weights [n + 1], oldest first, non-negative, sum 1
/// out    decay [n]
/// error  usage: no weight, a negative one, or a sum other than 1
std::vector<double> decay_of_weights(std::span<const double> weights);

/// The decay of the recorded updates that weights imply once they are divided by their sum (an EMA's closed form sums
/// to less than 1); empty where a weight is negative, which no decay explains.
std::vector<double> implied_decay(std::span<const double> weights);

/// A decay as checkpoint weights when every update would be computed anew at the state that the decay has reached,
/// where weights_of_decay scales updates as they were recorded. With A the map of one recorded update, a gradient step
/// on a quadratic, the decayed steps are prod_j ((1 - w_j) I + w_j A): its coefficient of A^k is the weight of
/// checkpoint k. Exact for gradient descent on a quadratic with a checkpoint after every step. in     decay [n], 1 >=
/// w_1 >= ... >= w_n >= 0 out    weights [n + 1], oldest first: coefficients of prod_j (1 - w_j + w_j t), non-negative,
/// sum 1 error  usage: a factor that is out of range or above its predecessor
std::vector<double> qam_weights(std::span<const double> decay);

/// Whether decay_of_weights takes them: non-negative, sum 1 to 1e-9.
bool is_decay(std::span<const double> weights);

}  // namespace kiln

#include "merge/weights.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>
#include <string>
#include <utility>

#include "base/error.h"

namespace kiln {
namespace {

// Rounding of a sum of thousands of weights stays far below this; a real mistake lies far above.
constexpr double kTolerance = 1e-9;

constexpr std::array<std::pair<MergeMethod, std::string_view>, 7> kMethods{{{MergeMethod::sma, "sma"},
                                                                            {MergeMethod::wma, "wma"},
                                                                            {MergeMethod::ema, "ema"},
                                                                            {MergeMethod::ema_closed, "ema-closed"},
                                                                            {MergeMethod::schedule, "schedule"},
                                                                            {MergeMethod::qam, "qam"},
                                                                            {MergeMethod::custom, "custom"}}};
template <typename Table, typename Value>
std::string_view name_of(const Table& table, Value value) {
  const auto* found = std::find_if(table.begin(), table.end(), [&](const auto& row) { return row.first == value; });
  check(found != table.end(), "value {} has no name", static_cast<int>(value));
  return found->second;
}

template <typename Table>
auto value_of(const Table& table, std::string_view name, std::string_view what) {
  const auto* found = std::find_if(table.begin(), table.end(), [&](const auto& row) { return row.second == name; });
  if (found == table.end()) {
    std::string known;
    for (const auto& row : table) known += (known.empty() ? "" : ", ") + std::string(row.second);
    fail(ExitCode::usage, "{} '{}' does not exist; use one of {}", what, name, known);
  }
  return found->first;
}

double total(std::span<const double> weights) { return std::accumulate(weights.begin(), weights.end(), 0.0); }

void normalise(std::vector<double>& weights) {
  const double sum = total(weights);
  check(sum > 0.0, "the weights sum to {}; give weights with a positive sum", sum);
  for (double& weight : weights) weight /= sum;
}

std::vector<double> ema_weights(const WeightOptions& options, std::size_t count) {
  check(options.alpha > 0.0 && options.alpha <= 1.0, "alpha is {}; give a number in (0, 1]", options.alpha);
  std::vector<double> weights(count);
  for (std::size_t i = 0; i < count; ++i)
    weights[i] = options.alpha * std::pow(1.0 - options.alpha, static_cast<double>(count - 1 - i));
  if (options.method == MergeMethod::ema)
    weights[0] = std::pow(1.0 - options.alpha, static_cast<double>(count - 1));
  else if (options.normalise)
    normalise(weights);
  return weights;
}

std::vector<double> decay_of_options(const WeightOptions& options, std::size_t count) {
  if (options.decay.empty()) return decay_factors(options.shape, count - 1, options.final_ratio);
  check(options.decay.size() == count - 1, "{} decay factors for {} checkpoints; give {}, one for each recorded update",
        options.decay.size(), count, count - 1);
  return options.decay;
}

/// Written so that NaN fails too.
void check_decay(std::span<const double> decay) {
  double previous = 1.0;
  for (std::size_t j = 0; j < decay.size(); ++j) {
    check(decay[j] >= -kTolerance && decay[j] <= previous + kTolerance,
          "decay factor {} is {} after {}; give factors that fall from at most 1 to at least 0", j + 1, decay[j],
          previous);
    previous = decay[j];
  }
}

std::vector<double> custom_weights(const WeightOptions& options, std::size_t count) {
  check(options.custom.size() == count, "{} weights for {} checkpoints; give one for each, oldest first",
        options.custom.size(), count);
  for (std::size_t i = 0; i < count; ++i)
    check(std::isfinite(options.custom[i]), "weight {} is {}; give finite numbers", i + 1, options.custom[i]);
  std::vector<double> weights = options.custom;
  if (options.normalise) normalise(weights);
  return weights;
}

}  // namespace

std::string_view to_string(MergeMethod method) { return name_of(kMethods, method); }
MergeMethod parse_merge_method(std::string_view name) { return value_of(kMethods, name, "merge method"); }

std::vector<double> merge_weights(const WeightOptions& options, std::size_t count) {
  check(count > 0, "no checkpoint to merge; give at least one");
  std::vector<double> weights(count);
  switch (options.method) {
    case MergeMethod::sma:
      std::fill(weights.begin(), weights.end(), 1.0 / static_cast<double>(count));
      return weights;
    case MergeMethod::wma:
      std::iota(weights.begin(), weights.end(), 1.0);
      normalise(weights);
      return weights;
    case MergeMethod::ema:
    case MergeMethod::ema_closed:
      return ema_weights(options, count);
    case MergeMethod::schedule:
      return weights_of_decay(decay_of_options(options, count));
    case MergeMethod::qam:
      return qam_weights(decay_of_options(options, count));
    case MergeMethod::custom:
      return custom_weights(options, count);
  }
  fail(ExitCode::usage, "unknown merge method {}", static_cast<int>(options.method));
}

std::vector<double> decay_factors(DecayShape shape, std::size_t updates, double final_ratio) {
  check(final_ratio >= 0.0 && final_ratio < 1.0, "final_ratio is {}; give a number in [0, 1)", final_ratio);
  std::vector<double> decay(updates);
  for (std::size_t j = 0; j < updates; ++j) {
    const double x = static_cast<double>(j + 1) / static_cast<double>(updates + 1);
    decay[j] = final_ratio + (1.0 - final_ratio) * decay_at(shape, x);
  }
  return decay;
}

std::vector<double> weights_of_decay(std::span<const double> decay) {
  check_decay(decay);
  std::vector<double> weights;
  double previous = 1.0;
  for (const double factor : decay) {
    weights.push_back(previous - factor);
    previous = factor;
  }
  weights.push_back(previous);
  return weights;
}

std::vector<double> qam_weights(std::span<const double> decay) {
  check_decay(decay);
  std::vector<double> weights{1.0};
  for (const double factor : decay) {  // times 1 - w + w t: a convex mix, so nothing cancels
    weights.push_back(factor * weights.back());
    for (std::size_t k = weights.size() - 2; k > 0; --k)
      weights[k] = (1.0 - factor) * weights[k] + factor * weights[k - 1];
    weights[0] *= 1.0 - factor;
  }
  return weights;
}

bool is_decay(std::span<const double> weights) {
  const bool non_negative = std::all_of(weights.begin(), weights.end(), [](double w) { return w >= -kTolerance; });
  return !weights.empty() && non_negative && std::abs(total(weights) - 1.0) <= kTolerance;
}

std::vector<double> decay_of_weights(std::span<const double> weights) {
  check(is_decay(weights), "{} weights that sum to {} are no decay; give non-negative weights that sum to 1",
        weights.size(), total(weights));
  std::vector<double> decay(weights.size() - 1);
  double tail = 0.0;
  for (std::size_t j = decay.size(); j > 0; --j) decay[j - 1] = tail += weights[j];
  return decay;
}

std::vector<double> implied_decay(std::span<const double> weights) {
  std::vector<double> scaled(weights.begin(), weights.end());
  const double sum = total(weights);
  for (double& weight : scaled) weight /= sum;
  return is_decay(scaled) ? decay_of_weights(scaled) : std::vector<double>{};
}

}  // namespace kiln

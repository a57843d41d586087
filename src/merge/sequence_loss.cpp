#include "merge/sequence_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"

namespace kiln {
namespace {

/// By sequence.
std::vector<double> differences(const SequenceLosses& a, const SequenceLosses& b) {
  check(!a.nats.empty() && a.nats.size() == b.nats.size() && a.targets == b.targets,
        "losses of {} and {} sequences cannot be paired; evaluate both models on the same data", a.nats.size(),
        b.nats.size());
  std::vector<double> d(a.nats.size());
  std::transform(a.nats.begin(), a.nats.end(), b.nats.begin(), d.begin(), std::minus<>());
  return d;
}

double total(const std::vector<std::int64_t>& targets) {
  return static_cast<double>(std::accumulate(targets.begin(), targets.end(), std::int64_t{0}));
}

}  // namespace

double mean_loss(const SequenceLosses& losses) {
  return std::accumulate(losses.nats.begin(), losses.nats.end(), 0.0) / total(losses.targets);
}

PairedDifference paired_difference(const SequenceLosses& a, const SequenceLosses& b) {
  const std::vector<double> d = differences(a, b);
  const double targets = total(a.targets), n = static_cast<double>(d.size());
  PairedDifference result{.mean = std::accumulate(d.begin(), d.end(), 0.0) / targets,
                          .standard_error = std::numeric_limits<double>::quiet_NaN()};
  if (d.size() < 2) return result;
  double squares = 0;
  for (std::size_t i = 0; i < d.size(); ++i) {
    const double residual = d[i] - result.mean * static_cast<double>(a.targets[i]);
    squares += residual * residual;
  }
  result.standard_error = std::sqrt(n / (n - 1) * squares) / targets;
  return result;
}

Interval bootstrap_difference(const SequenceLosses& a, const SequenceLosses& b, int draws, std::uint64_t seed) {
  check(draws >= 40, "{} resamplings; give 40 or more, or 95 % of them mean nothing", draws);
  const std::vector<double> d = differences(a, b);
  std::vector<double> means;
  for (int draw = 0; draw < draws; ++draw) {
    const Philox random(seed, static_cast<std::uint64_t>(draw));
    double sum = 0;
    std::int64_t targets = 0;
    for (std::size_t i = 0; i < d.size(); ++i) {
      const std::size_t pick = random.bits(i) % d.size();
      sum += d[pick];
      targets += a.targets[pick];
    }
    means.push_back(sum / static_cast<double>(std::max<std::int64_t>(targets, 1)));
  }
  std::sort(means.begin(), means.end());
  const auto at = [&](double share) { return means[static_cast<std::size_t>(share * (draws - 1) + 0.5)]; };
  return {.low = at(0.025), .high = at(0.975)};
}

}  // namespace kiln

#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace kiln {

/// Losses of one model on the sequences of a held-out set, in their order.
struct SequenceLosses {
  std::vector<double> nats;           // summed over a sequence's targets
  std::vector<std::int64_t> targets;  // that count
};

/// Nats per target.
double mean_loss(const SequenceLosses& losses);

/// A difference of two models on one held-out set. What is hard about a sequence is hard for both and cancels, so the
/// error of the difference is far below that of either loss.
struct PairedDifference {
  double mean = 0;            // a - b, nats per target
  double standard_error = 0;  // over sequences, as a ratio estimator; NaN for fewer than two
};
/// A usage Error when a and b are not of the same sequences.
PairedDifference paired_difference(const SequenceLosses& a, const SequenceLosses& b);

/// The central 95 % of the mean of a - b over `draws` resamplings of the sequences, seeded. A usage Error as above.
struct Interval {
  double low = 0, high = 0;
};
Interval bootstrap_difference(const SequenceLosses& a, const SequenceLosses& b, int draws, std::uint64_t seed);

}  // namespace kiln

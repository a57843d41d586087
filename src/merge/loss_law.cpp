#include "merge/loss_law.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "merge/nelder_mead.h"

namespace kiln {
namespace {

constexpr std::size_t kBlocks = 200, kDrops = 64, kFewest = 8;
constexpr double kHuber = 1e-3;   // of log loss, as in the law's paper
constexpr double kSkipped = 0.1;  // of a curve, which the laws do not describe

/// What a law reads of a schedule, with rates in units of the peak.
struct Schedule {
  std::vector<double> lr, sum;  // sum[i]: lr of steps 1 .. i
  std::size_t warmup = 0;       // steps until the peak
  /// Drops after warm-up, neighbours pooled: MPL's sum over k has one term each.
  struct Drop {
    std::size_t step;
    double size, lr;
  };
  std::vector<Drop> drops;
};

void pool_drops(Schedule& s) {
  std::vector<Schedule::Drop> all;
  for (std::size_t i = s.warmup; i < s.lr.size(); ++i)  // step i + 1 against step i
    if (s.lr[i] < s.lr[i - 1]) all.push_back({i + 1, s.lr[i - 1] - s.lr[i], s.lr[i]});
  const std::size_t pooled = (all.size() + kDrops - 1) / kDrops;
  for (std::size_t first = 0; first < all.size(); first += pooled) {
    const std::size_t last = std::min(first + pooled, all.size());
    Schedule::Drop drop = all[first + (last - first) / 2];
    drop.size = 0;
    for (std::size_t i = first; i < last; ++i) drop.size += all[i].size;
    s.drops.push_back(drop);
  }
}

Schedule schedule_of(std::span<const double> lr, double peak) {
  Schedule s;
  s.sum.push_back(0);
  for (const double rate : lr) {
    s.lr.push_back(rate / peak);
    s.sum.push_back(s.sum.back() + rate / peak);
  }
  const auto top = std::max_element(lr.begin(), lr.end());
  s.warmup = static_cast<std::size_t>(top - lr.begin()) + 1;
  pool_drops(s);
  return s;
}

/// Exponents of the search: alpha, then those of the decay term, as the fit stores them.
struct Exponents {
  double alpha;
  std::array<double, 3> decay;
};

/// The search moves freely; exponents stay where the laws make sense.
Exponents exponents_at(LossLaw law, const std::vector<double>& x) {
  const auto within = [&](std::size_t i, double low, double high) { return std::clamp(std::exp(x[i]), low, high); };
  Exponents e{.alpha = within(0, 0.02, 3.0), .decay = {}};
  if (x.size() == 1) return e;  // no decay to describe
  if (law == LossLaw::mtl)
    e.decay = {1.0 - within(1, 1e-5, 0.9), 0, 0};
  else
    e.decay = {within(1, 1e-6, 1e3), within(2, 0.01, 5.0), within(3, 0.01, 3.0)};
  return e;
}

/// S2 of MTL after each step; index 0 is before the first.
std::vector<double> annealing_area(const Schedule& s, double lambda) {
  std::vector<double> area(s.lr.size() + 1, 0.0);
  double momentum = 0;
  for (std::size_t i = 0; i < s.lr.size(); ++i) {
    momentum = lambda * momentum + (i >= s.warmup ? s.lr[i - 1] - s.lr[i] : 0.0);
    area[i + 1] = area[i] + momentum;
  }
  return area;
}

double multi_power(const Schedule& s, const std::array<double, 3>& c, std::size_t step) {
  double sum = 0;
  for (const Schedule::Drop& drop : s.drops) {
    if (drop.step > step) break;
    const double since = s.sum[step] - s.sum[drop.step - 1];
    // A rate of zero trains nothing: the limit of lr^-gamma S_k there is zero too, since S_k is that rate itself.
    const double rate = std::max(drop.lr, 1e-12);
    sum += drop.size * (1.0 - std::pow(1.0 + c[0] * std::pow(rate, -c[2]) * since, -c[1]));
  }
  return sum;
}

/// The decay term's feature after each of `steps`.
std::vector<double> decay_feature(LossLaw law, const Schedule& s, const Exponents& e,
                                  std::span<const std::size_t> steps) {
  std::vector<double> feature;
  if (s.drops.empty()) return std::vector<double>(steps.size(), 0.0);
  const std::vector<double> area = law == LossLaw::mtl ? annealing_area(s, e.decay[0]) : std::vector<double>{};
  for (const std::size_t step : steps)
    feature.push_back(law == LossLaw::mtl ? area[step] : multi_power(s, e.decay, step));
  return feature;
}

/// A curve as it is fitted: blocks of the points that count.
struct Points {
  Schedule schedule;
  std::vector<std::size_t> step;
  std::vector<double> loss;
};

Points points_of(const LossCurve& curve, double peak) {
  Points points{.schedule = schedule_of(curve.lr, peak), .step = {}, .loss = {}};
  check(curve.step.size() == curve.loss.size(), "a curve of {} steps and {} losses", curve.step.size(),
        curve.loss.size());
  const auto skipped =
      std::max(points.schedule.warmup, static_cast<std::size_t>(kSkipped * static_cast<double>(curve.lr.size())));
  std::vector<std::size_t> kept;
  for (std::size_t i = 0; i < curve.step.size(); ++i) {
    const auto step = static_cast<std::size_t>(curve.step[i]);
    check(step >= 1 && step <= curve.lr.size(), "a loss at step {}, beyond the {} learning rates of its curve", step,
          curve.lr.size());
    if (step > skipped && std::isfinite(curve.loss[i]) && curve.loss[i] > 0) kept.push_back(i);
  }
  const std::size_t blocks =
      std::min(kBlocks, kept.size());  // none for a curve that is too short, which then adds nothing
  for (std::size_t b = 0; b < blocks; ++b) {
    const std::size_t begin = kept.size() * b / blocks, end = kept.size() * (b + 1) / blocks;
    double loss = 0;
    for (std::size_t i = begin; i < end; ++i) loss += curve.loss[kept[i]];
    points.loss.push_back(loss / static_cast<double>(end - begin));
    points.step.push_back(static_cast<std::size_t>(curve.step[kept[begin + (end - begin) / 2]]));
  }
  return points;
}

using Row = std::array<double, 3>;  // 1, S1^-alpha, minus the decay feature

/// Least squares over the columns of `used`, by normal equations with pivots; false when they are singular.
bool solve(const std::vector<Row>& rows, const std::vector<double>& y, const std::vector<double>& weight, unsigned used,
           Row& x) {
  std::array<std::array<double, 4>, 3> m{};
  for (std::size_t r = 0; r < rows.size(); ++r)
    for (std::size_t i = 0; i < 3; ++i) {
      for (std::size_t j = 0; j < 3; ++j) m[i][j] += weight[r] * rows[r][i] * rows[r][j];
      m[i][3] += weight[r] * rows[r][i] * y[r];
    }
  for (std::size_t i = 0; i < 3; ++i)
    if ((used >> i & 1u) == 0) {
      for (std::size_t j = 0; j < 3; ++j) m[i][j] = m[j][i] = i == j ? 1.0 : 0.0;
      m[i][3] = 0;
    }
  for (std::size_t i = 0; i < 3; ++i) {
    std::size_t pivot = i;
    for (std::size_t r = i; r < 3; ++r)
      if (std::abs(m[r][i]) > std::abs(m[pivot][i])) pivot = r;
    if (std::abs(m[pivot][i]) < 1e-14) return false;
    std::swap(m[i], m[pivot]);
    for (std::size_t r = 0; r < 3; ++r) {
      if (r == i) continue;
      const double factor = m[r][i] / m[i][i];
      for (std::size_t j = i; j < 4; ++j) m[r][j] -= factor * m[i][j];
    }
  }
  for (std::size_t i = 0; i < 3; ++i) x[i] = m[i][3] / m[i][i];
  return true;
}

double value_of(const Row& row, const Row& x) { return row[0] * x[0] + row[1] * x[1] + row[2] * x[2]; }

/// The best non-negative scales: of all choices of columns whose solution is non-negative, the one that fits best.
Row solve_non_negative(const std::vector<Row>& rows, const std::vector<double>& y, const std::vector<double>& weight) {
  Row best{};
  double least = INFINITY;
  for (unsigned used = 1; used < 8; ++used) {
    Row x{};
    if (!solve(rows, y, weight, used, x) || std::any_of(x.begin(), x.end(), [](double v) { return v < 0; })) continue;
    double squares = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const double error = value_of(rows[r], x) - y[r];
      squares += weight[r] * error * error;
    }
    if (squares < least) least = squares, best = x;
  }
  return best;
}

double huber(double error) {
  const double size = std::abs(error);
  return size <= kHuber ? 0.5 * error * error : kHuber * (size - 0.5 * kHuber);
}

/// The scales at given exponents and how well they fit.
struct Trial {
  Row scales{};
  double objective = INFINITY, rms = 0;
};

Trial fit_scales(const std::vector<Row>& rows, const std::vector<double>& loss) {
  Trial trial;
  std::vector<double> weight(loss.size());
  for (std::size_t r = 0; r < loss.size(); ++r) weight[r] = 1.0 / (loss[r] * loss[r]);  // errors of the log
  for (int round = 0; round < 8; ++round) {
    trial.scales = solve_non_negative(rows, loss, weight);
    trial.objective = trial.rms = 0;
    for (std::size_t r = 0; r < loss.size(); ++r) {
      const double value = value_of(rows[r], trial.scales);
      const double error = value > 0 ? std::log(value / loss[r]) : INFINITY;
      trial.objective += huber(error);
      trial.rms += error * error;
      weight[r] = std::min(1.0, kHuber / std::max(std::abs(error), 1e-300)) / (loss[r] * loss[r]);
    }
  }
  trial.rms = std::sqrt(trial.rms / static_cast<double>(loss.size()));
  return trial;
}

Trial trial_at(LossLaw law, const std::vector<Points>& curves, const Exponents& e) {
  std::vector<Row> rows;
  std::vector<double> loss;
  for (const Points& points : curves) {
    const std::vector<double> decay = decay_feature(law, points.schedule, e, points.step);
    for (std::size_t i = 0; i < points.step.size(); ++i) {
      rows.push_back({1.0, std::pow(points.schedule.sum[points.step[i]], -e.alpha), -decay[i]});
      loss.push_back(points.loss[i]);
    }
  }
  return fit_scales(rows, loss);
}

/// Logarithms of the exponents that searches start from.
std::vector<std::vector<double>> starts(LossLaw law, bool knows_decay) {
  std::vector<std::vector<double>> all;
  for (const double alpha : {0.3, 0.8}) {
    if (!knows_decay) {
      all.push_back({std::log(alpha)});
    } else if (law == LossLaw::mtl) {
      for (const double forgetting : {0.1, 0.02, 0.004}) all.push_back({std::log(alpha), std::log(forgetting)});
    } else {
      for (const double c : {0.01, 0.3})
        for (const double beta : {0.3, 1.0})
          all.push_back({std::log(alpha), std::log(c), std::log(beta), std::log(0.5)});
    }
  }
  return all;
}

}  // namespace

std::string_view to_string(LossLaw law) { return law == LossLaw::mtl ? "MTL" : "MPL"; }

LossLawFit fit_loss_law(LossLaw law, std::span<const LossCurve> curves) {
  check(!curves.empty(), "no loss curve to fit; give one or more");
  LossLawFit fit{.law = law, .peak_lr = 0};
  for (const LossCurve& curve : curves)
    for (const double rate : curve.lr) fit.peak_lr = std::max(fit.peak_lr, rate);
  check(fit.peak_lr > 0, "every learning rate of the curves is 0; give a run that trained");
  std::vector<Points> points;
  std::size_t count = 0;
  for (const LossCurve& curve : curves) {
    points.push_back(points_of(curve, fit.peak_lr));
    count += points.back().step.size();
  }
  check(count >= kFewest, "{} losses after warm-up, too few for a loss law; log at least {}", count, kFewest);
  fit.knows_decay = std::any_of(points.begin(), points.end(), [](const Points& p) {
    return !p.step.empty() && !p.schedule.drops.empty() && p.schedule.drops.front().step <= p.step.back();
  });

  const auto objective = [&](const std::vector<double>& x) {
    return trial_at(law, points, exponents_at(law, x)).objective;
  };
  Minimum best{{}, INFINITY};
  for (const std::vector<double>& start : starts(law, fit.knows_decay)) {
    Minimum found = nelder_mead(objective, start, 0.5, 400);
    if (best.x.empty() || found.value < best.value) best = std::move(found);
  }
  const Exponents e = exponents_at(law, best.x);
  const Trial trial = trial_at(law, points, e);
  fit.l0 = trial.scales[0];
  fit.a = trial.scales[1];
  fit.decay_scale = trial.scales[2];
  fit.alpha = e.alpha;
  fit.decay = e.decay;
  fit.rms_log_error = trial.rms;
  return fit;
}

double predict_loss(const LossLawFit& fit, std::span<const double> lr) {
  check(!lr.empty(), "no learning rate to predict a loss for; give those of every step");
  const Schedule schedule = schedule_of(lr, fit.peak_lr);
  const std::size_t last = lr.size();
  const double decay = decay_feature(fit.law, schedule, {fit.alpha, fit.decay}, std::span(&last, 1)).front();
  return fit.l0 + fit.a * std::pow(schedule.sum.back(), -fit.alpha) - fit.decay_scale * decay;
}

}  // namespace kiln

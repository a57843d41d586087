#include <algorithm>

#include "merge/anneal_check.h"
#include "merge/prediction.h"
#include "report/metrics.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

/// Appends steps after those that `curve` already has, up to `end`.
void append(LossCurve& curve, const std::vector<StepMetrics>& metrics, std::int64_t end) {
  for (const StepMetrics& m : metrics) {
    if (m.step > end || m.step <= static_cast<std::int64_t>(curve.lr.size())) continue;
    curve.lr.resize(static_cast<std::size_t>(m.step), m.lr);
    curve.step.push_back(m.step);
    curve.loss.push_back(m.loss);
  }
}

}  // namespace

std::vector<LossCurve> read_curves(const fs::path& run_dir, std::int64_t end) {
  std::vector<LossCurve> curves;
  if (!fs::exists(run_dir / "metrics.jsonl")) return curves;
  append(curves.emplace_back(), read_metrics(run_dir / "metrics.jsonl"), end);
  for (const AnnealCheck& check : read_checks(run_dir)) {
    const fs::path metrics = run_dir / "anneals" / anneal_name(check.anneal) / "metrics.jsonl";
    const auto begin = static_cast<std::size_t>(check.anneal.begin);
    if (check.anneal.end >= end || begin > curves.front().lr.size() || !fs::exists(metrics)) continue;
    LossCurve branch;
    branch.lr.assign(curves.front().lr.begin(), curves.front().lr.begin() + check.anneal.begin);
    append(branch, read_metrics(metrics), check.anneal.end);
    curves.push_back(std::move(branch));
  }
  return curves;
}

}  // namespace kiln

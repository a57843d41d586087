#include "merge/merge_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/text.h"

namespace kiln {
namespace {

template <typename T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

}  // namespace

Json to_json(const MergedCheckpoint& row) {
  return {{"path", row.directory.string()},
          {"step", or_null(row.step)},
          {"tokens", or_null(row.tokens)},
          {"weight", row.weight},
          {"decay", or_null(row.decay)}};
}

Json to_json(const MergeReport& report) {
  Json json = {{"checkpoints", Json::array()},          {"tensors", report.tensors},
               {"elements", report.elements},           {"bytes_read", report.bytes_read},
               {"bytes_written", report.bytes_written}, {"seconds", report.seconds},
               {"open_seconds", report.open_seconds},   {"average_seconds", report.average_seconds}};
  for (const MergedCheckpoint& row : report.checkpoints) json["checkpoints"].push_back(to_json(row));
  return json;
}

std::string merge_table(const MergeReport& report) {
  std::size_t width = std::string_view("checkpoint").size();
  for (const MergedCheckpoint& row : report.checkpoints) width = std::max(width, row.directory.string().size());
  std::string text = fmt::format("{:<{}}  {:>10}  {:>9}  {:>9}\n", "checkpoint", width, "step", "weight", "decay");
  for (const MergedCheckpoint& row : report.checkpoints)
    text += fmt::format("{:<{}}  {:>10}  {:>9.6f}  {:>9}\n", row.directory.string(), width,
                        row.step ? fmt::to_string(*row.step) : "-", row.weight,
                        row.decay ? fmt::format("{:.6f}", *row.decay) : "-");
  double sum = 0.0;
  for (const MergedCheckpoint& row : report.checkpoints) sum += row.weight;
  if (std::abs(sum - 1.0) > 1e-9)
    text += fmt::format(
        "the weights sum to {:.6g}, which scales the model; the decay is that of weights that sum to 1\n", sum);
  return text + fmt::format("{} tensors, {} weights: read {}, wrote {} in {:.2f} s\n", report.tensors,
                            human_count(static_cast<double>(report.elements)), human_bytes(report.bytes_read),
                            human_bytes(report.bytes_written), report.seconds);
}

}  // namespace kiln

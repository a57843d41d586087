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

std::string dry_run_text(const MergeReport& report) {
  std::string text =
      fmt::format("{} of {} model files match a recorded hash", report.verified_files, report.input_files);
  if (report.verified_files < report.input_files) text += "; the others were not compared";
  return text + fmt::format(
                    "\n{} tensors, {} weights: would read {}, and write {} of tensors to {}:\n  {}\nnothing was "
                    "written\n",
                    report.tensors, human_count(static_cast<double>(report.elements)), human_bytes(report.bytes_read),
                    human_bytes(report.bytes_written), report.output.string(), fmt::join(report.files, " "));
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
  Json json = {{"checkpoints", Json::array()},
               {"output", report.output.string()},
               {"files", report.files},
               {"dry_run", report.dry_run},
               {"input_files", report.input_files},
               {"verified_files", report.verified_files},
               {"tensors", report.tensors},
               {"elements", report.elements},
               {"bytes_read", report.bytes_read},
               {"bytes_written", report.bytes_written},
               {"seconds", report.seconds},
               {"open_seconds", report.open_seconds},
               {"average_seconds", report.average_seconds}};
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
  if (report.dry_run) return text + dry_run_text(report);
  return text + fmt::format("{} tensors, {} weights: read {}, wrote {} in {:.2f} s\n", report.tensors,
                            human_count(static_cast<double>(report.elements)), human_bytes(report.bytes_read),
                            human_bytes(report.bytes_written), report.seconds);
}

}  // namespace kiln

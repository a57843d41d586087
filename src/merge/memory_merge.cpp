#include "merge/memory_merge.h"

#include <atomic>

#include "base/error.h"
#include "core/parallel.h"
#include "merge/average.h"

namespace kiln {
namespace {

Sources sources_of(std::span<const MergeInput* const> inputs, const Parameter& parameter) {
  Sources sources;
  for (const MergeInput* input : inputs) {
    const auto found = input->model->all().find(parameter.name);
    if (found == input->model->all().end() || found->second.entry->shape != parameter.shape.sizes())
      fail(ExitCode::data, "{}: tensor '{}' is missing or not of shape {}, as its config.json says; leave it out",
           input->directory.string(), parameter.name, parameter.shape.str());
    sources.push_back(found->second);
  }
  return sources;
}

void average_into(const Sources& sources, std::span<const double> weights, const Tensor& target) {
  constexpr std::int64_t kPiece = 1 << 18;
  const std::span<float> out = target.span<float>();
  std::atomic<bool> finite = true;
  parallel_for(target.numel(), kPiece, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t first = begin; first < end; first += kPiece) {
      const auto at = static_cast<std::size_t>(first);
      const auto count = static_cast<std::size_t>(std::min(kPiece, end - first));
      if (!average(sources, weights, at, DType::f32, std::as_writable_bytes(out.subspan(at, count)))) finite = false;
      release_sources(sources, at, count);
    }
  });
  if (!finite) fail_not_finite(sources, 0, out.size(), DType::f32);
}

}  // namespace

void merge_into(std::span<const MergeInput* const> inputs, std::span<const double> weights,
                const ModelWeights& target) {
  check(!inputs.empty() && inputs.size() == weights.size(), "{} checkpoints and {} weights; give one weight for each",
        inputs.size(), weights.size());
  for (const Parameter& parameter : target.table().parameters)
    average_into(sources_of(inputs, parameter), weights, target.view(parameter));
}

}  // namespace kiln

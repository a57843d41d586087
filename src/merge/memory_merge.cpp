#include "merge/memory_merge.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "base/error.h"
#include "core/parallel.h"
#include "merge/average.h"

namespace kiln {
namespace {

constexpr std::size_t kPiece = 1 << 16;  // elements after which the inputs' memory is given back

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

void average_into(const Sources& sources, std::span<const double> weights, const Tensor& target, InputMemory& memory) {
  const std::span<float> out = target.span<float>();
  std::atomic<bool> finite = true;
  std::mutex mutex;
  std::exception_ptr error;
  parallel_for(target.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    try {
      const auto part = out.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
      for (std::size_t at = 0; at < part.size(); at += kPiece) {
        const std::span<float> piece = part.subspan(at, std::min(kPiece, part.size() - at));
        const std::uint64_t first = static_cast<std::uint64_t>(begin) + at;
        if (!average(sources, weights, first, DType::f32, std::as_writable_bytes(piece))) finite = false;
        memory.done(sources, first, piece.size());
      }
    } catch (...) {  // must not leave the thread
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  if (!finite) fail_not_finite(sources, 0, out.size(), DType::f32);
}

}  // namespace

void merge_into(std::span<const MergeInput* const> inputs, std::span<const double> weights,
                const ModelWeights& target) {
  check(!inputs.empty() && inputs.size() == weights.size(), "{} checkpoints and {} weights; give one weight for each",
        inputs.size(), weights.size());
  InputMemory memory;
  for (const Parameter& parameter : target.table().parameters)
    average_into(sources_of(inputs, parameter), weights, target.view(parameter), memory);
}

}  // namespace kiln

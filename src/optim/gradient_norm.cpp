#include "optim/gradient_norm.h"

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "graph/parameter.h"
#include "optim/squared_sum.h"

namespace kiln {
namespace {

constexpr std::int64_t kBlock = 4096;  // elements summed by one thread at a time

std::int64_t block_count(std::int64_t elements) { return (elements + kBlock - 1) / kBlock; }

}  // namespace

GradientNorm::GradientNorm(Options options) : options_(options) {
  check(options.clip_norm >= 0, "optimizer.clip_norm: {}, expected at least 0 (0 turns clipping off)",
        options.clip_norm);
  check(!options.running || options.clip_norm == 0, "optimizer.clip_norm: {}, but a running norm clips nothing",
        options.clip_norm);
}

std::vector<TensorSpec> GradientNorm::infer(std::span<const TensorSpec> in) const {
  check(!in.empty() && in.back() == scalars_spec(), "gradient_norm: the last input must be the step's scalars");
  return {};
}

std::size_t GradientNorm::workspace_bytes(std::span<const TensorSpec> in) const {
  std::int64_t most = 0;
  for (const TensorSpec& spec : in.first(in.size() - 1)) most = std::max(most, block_count(spec.shape.numel()));
  return static_cast<std::size_t>(most) * sizeof(double);
}

Cost GradientNorm::cost(std::span<const TensorSpec> in) const {
  Cost cost;
  for (const TensorSpec& spec : in.first(in.size() - 1)) {
    cost.flops += 2.0 * static_cast<double>(spec.shape.numel());
    cost.bytes += static_cast<double>(spec.bytes());
  }
  return cost;
}

void GradientNorm::run_cpu(const KernelArgs& args) const {
  double* partial = static_cast<double*>(args.workspace.data);
  const double before = options_.running ? scalar(args.in.back(), Scalar::grad_norm) : 0.0;
  double total = before * before;
  for (const Tensor& gradient : args.in.first(args.in.size() - 1)) {
    const std::int64_t n = gradient.numel(), blocks = block_count(n);
    visit_real(gradient.dtype(), [&]<typename T>() {
      const T* g = gradient.as<T>();
      parallel_for(blocks, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b)
          partial[b] = squared_sum(g + b * kBlock, std::min(kBlock, n - b * kBlock));
      });
    });
    for (std::int64_t b = 0; b < blocks; ++b) total += partial[b];
  }
  const Tensor& scalars = args.in.back();
  const double loss = scalar(scalars, Scalar::loss);
  const double norm = std::isfinite(loss) ? std::sqrt(total) : loss, limit = options_.clip_norm;
  scalar(scalars, Scalar::grad_norm) = norm;
  scalar(scalars, Scalar::clip_scale) = limit > 0 ? std::min(1.0, limit / (norm + 1e-6)) : 1.0;
}

}  // namespace kiln

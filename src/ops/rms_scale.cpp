#include "ops/rms_scale.h"

#include "core/parallel.h"
#include "ops/checks.h"

namespace kiln {

std::vector<TensorSpec> RmsScale::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 3);
  expect_same_real(name(), in.first(2));
  expect_rank(name(), "r", in[0], 2);
  expect_shape(name(), "w", in[1], {in[0].shape[1]});
  expect_shape(name(), "rstd", in[2], {in[0].shape[0]});
  expect_dtype(name(), "rstd", in[2], accumulator_of(in[0].dtype));
  return {in[0]};
}

Cost RmsScale::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape.numel());
  return {2.0 * n, 2.0 * n * static_cast<double>(size_of(in[0].dtype))};
}

void RmsScale::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1];
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* r = args.in[0].as<T>();
    const T* w = args.in[1].as<T>();
    const T* rstd = args.in[2].as<T>();
    T* y = args.out[0].as<T>();
    parallel_for(n, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        for (std::int64_t c = 0; c < width; ++c) y[i * width + c] = r[i * width + c] * rstd[i] * w[c];
    });
  });
}

}  // namespace kiln

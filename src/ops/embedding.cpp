#include "ops/embedding.h"

#include <cstring>

#include "core/parallel.h"
#include "ops/checks.h"

namespace kiln {

std::vector<TensorSpec> Embedding::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 2);
  expect_dtype(name(), "tokens", in[0], DType::i32);
  expect_rank(name(), "tokens", in[0], 1);
  expect_same_real(name(), in.subspan(1));
  expect_rank(name(), "w", in[1], 2);
  return {{{in[0].shape[0], in[1].shape[1]}, in[1].dtype}};
}

void Embedding::gradient(GradientContext& context) const {
  if (!context.needs_gradient(1)) return;
  const std::int64_t vocab = context.in_spec(1).shape[0];
  const ValueId dy = context.grad_out(0), tokens = context.in(0);
  if (context.grad_in(1).valid())
    context.add(std::make_shared<EmbeddingGradient>(vocab, true), {tokens, dy, context.grad_in(1)}, "embedding.dw");
  else
    context.set_grad_in(
        1, context.add(std::make_shared<EmbeddingGradient>(vocab, false), {tokens, dy}, "embedding.dw")[0]);
}

Cost Embedding::cost(std::span<const TensorSpec> in) const {
  return {0.0, 2.0 * static_cast<double>(in[0].shape[0] * in[1].shape[1]) * static_cast<double>(size_of(in[1].dtype))};
}

void Embedding::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0];
  const std::int32_t* tokens = args.in[0].as<std::int32_t>();
  const std::size_t row = args.in[1].rows(0, 1).bytes();
  const auto* table = static_cast<const std::byte*>(args.in[1].data);
  auto* out = static_cast<std::byte*>(args.out[0].data);
  parallel_for(n, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      std::memcpy(out + static_cast<std::size_t>(i) * row, table + static_cast<std::size_t>(tokens[i]) * row, row);
  });
}

std::vector<TensorSpec> EmbeddingGradient::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, add_ ? 3 : 2);
  expect_same_real(name(), in.subspan(1, 1));
  const Shape shape{vocab_, in[1].shape[1]};
  expect_shape(name(), "dy", in[1], {in[0].shape[0], in[1].shape[1]});
  if (!add_) return {{shape, accumulator_of(in[1].dtype)}};
  expect_shape(name(), "dw", in[2], shape);
  expect_dtype(name(), "dw", in[2], accumulator_of(in[1].dtype));
  return {};
}

Cost EmbeddingGradient::cost(std::span<const TensorSpec> in) const {
  const double written = add_ ? 0.0 : static_cast<double>(vocab_ * in[1].shape[1]);
  return {static_cast<double>(in[1].shape.numel()),
          (written + 3.0 * static_cast<double>(in[1].shape.numel())) * static_cast<double>(size_of(in[1].dtype))};
}

void EmbeddingGradient::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[1].shape()[1];
  const std::int32_t* tokens = args.in[0].as<std::int32_t>();
  const Tensor dw = add_ ? args.in[2] : args.out[0];
  visit_real(args.in[1].dtype(), [&]<typename T>() {
    const T* dy = args.in[1].as<T>();
    T* out = dw.as<T>();
    if (!add_ && !args.accumulate)
      parallel_for(vocab_, 64, [&](std::int64_t begin, std::int64_t end) {
        std::memset(out + begin * width, 0, static_cast<std::size_t>((end - begin) * width) * sizeof(T));
      });
    // Threads own columns: each adds its part of every row in token order, whatever the number of threads.
    parallel_for(width, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = 0; i < n; ++i) {
        T* row = out + tokens[i] * width;
        for (std::int64_t c = begin; c < end; ++c) row[c] += dy[i * width + c];
      }
    });
  });
}

}  // namespace kiln

#include "ops/classifier.h"

#include <algorithm>

#include "core/parallel.h"
#include "graph/parameter.h"
#include "ops/checks.h"
#include "ops/classifier_chunk.h"

namespace kiln {
namespace {

template <typename T>
classifier::Layout<T> layout(std::int64_t chunk_tokens, const TensorSpec& x, const TensorSpec& w, bool gradient) {
  return {std::min(chunk_tokens, x.shape[0]), x.shape[1], w.shape[0], gradient};
}

}  // namespace

std::vector<TensorSpec> Classifier::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 4);
  expect_same_real(name(), in.first(2));
  expect_rank(name(), "x", in[0], 2);
  expect_rank(name(), "w", in[1], 2);
  check(in[0].shape[1] == in[1].shape[1], "{}: inner sizes {} and {} (x {} · w {}')", name(), in[0].shape[1],
        in[1].shape[1], in[0].shape.str(), in[1].shape.str());
  expect_shape(name(), "targets", in[2], {in[0].shape[0]});
  expect_dtype(name(), "targets", in[2], DType::i32);
  check(in[3] == scalars_spec(), "{}: scalars have shape {}, expected {}", name(), in[3].shape.str(),
        scalars_spec().shape.str());
  check(options_.valid_vocab >= 0 && options_.valid_vocab <= in[1].shape[0], "{}: {} classes in w of shape {}", name(),
        options_.valid_vocab, in[1].shape.str());
  const DType sums = accumulator_of(in[0].dtype);
  const TensorSpec losses{{in[0].shape[0]}, sums};
  if (!options_.gradient) return {losses};
  return {losses, in[0], {in[1].shape, sums}};
}

void Classifier::gradient(GradientContext& context) const {
  check(options_.gradient, "classifier: recorded without its gradient; record it with .gradient = true to train");
  if (context.needs_gradient(0)) context.set_grad_in(0, context.out(1));
  if (context.needs_gradient(1)) context.set_grad_in(1, context.out(2));
}

std::size_t Classifier::workspace_bytes(std::span<const TensorSpec> in) const {
  return visit_real(in[0].dtype, [&]<typename T>() {
    const auto size = layout<T>(options_.chunk_tokens, in[0], in[1], options_.gradient);
    return static_cast<std::size_t>(size.shared() + thread_count() * size.per_thread()) * sizeof(T);
  });
}

Cost Classifier::cost(std::span<const TensorSpec> in) const {
  const double n = static_cast<double>(in[0].shape[0]), c = static_cast<double>(in[0].shape[1]);
  const double v = static_cast<double>(in[1].shape[0]), passes = options_.gradient ? 3.0 : 1.0;
  return {2.0 * passes * n * c * v, passes * (n * c + v * c) * static_cast<double>(size_of(in[0].dtype))};
}

void Classifier::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], width = args.in[0].shape()[1];
  check(options_.valid_vocab == 0 || options_.valid_vocab == args.in[1].shape()[0],
        "{}: no padded vocabulary on the CPU", name());
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    auto size = layout<T>(options_.chunk_tokens, args.in[0].spec, args.in[1].spec, options_.gradient);
    for (std::int64_t first = 0; first < n; first += options_.chunk_tokens) {
      size.rows = std::min(options_.chunk_tokens, n - first);
      classifier::Chunk<T>{.size = size,
                           .x = args.in[0].as<T>() + first * width,
                           .w = args.in[1].as<T>(),
                           .targets = args.in[2].as<std::int32_t>() + first,
                           .ignored_target = kIgnoredTarget,
                           .scale = static_cast<T>(scalar(args.in[3], Scalar::loss_scale)),
                           .losses = args.out[0].as<T>() + first,
                           .dx = options_.gradient ? args.out[1].as<T>() + first * width : nullptr,
                           .dw = options_.gradient ? args.out[2].as<T>() : nullptr,
                           .accumulate = args.accumulate || first > 0,
                           .scratch = static_cast<T*>(args.workspace.data),
                           .threads = thread_count()}
          .run();
    }
  });
}

}  // namespace kiln

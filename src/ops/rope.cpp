#include "ops/rope.h"

#include <cmath>

#include "core/parallel.h"
#include "ops/checks.h"

namespace kiln {

std::vector<TensorSpec> Rope::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 3);
  expect_same_real(name(), in.first(1));
  expect_dtype(name(), "table", in[1], accumulator_of(in[0].dtype));
  expect_rank(name(), "qkv", in[0], 2);
  expect_shape(name(), "qkv", in[0], {in[0].shape[0], shape_.columns()});
  expect_shape(name(), "table", in[1], {in[1].shape[0], shape_.head_dim});
  expect_shape(name(), "first", in[2], {1});
  expect_dtype(name(), "first", in[2], DType::i32);
  check(shape_.head_dim % 2 == 0, "rope: head size {}, expected an even number", shape_.head_dim);
  check(in[0].shape[0] % shape_.seq_len == 0, "rope: {} rows, expected a multiple of the sequence length {}",
        in[0].shape[0], shape_.seq_len);
  check(in[1].shape[0] >= shape_.seq_len, "rope: table for {} positions, expected at least {}", in[1].shape[0],
        shape_.seq_len);
  return {};
}

void Rope::gradient(GradientContext& context) const {
  context.add(std::make_shared<Rope>(shape_, Direction::inverse), {context.grad_in(0), context.in(1), context.in(2)},
              "rope.dx");
}

Cost Rope::cost(std::span<const TensorSpec> in) const {
  const double share =
      static_cast<double>(shape_.heads + shape_.kv_heads) / static_cast<double>(shape_.heads + 2 * shape_.kv_heads);
  const double n = share * static_cast<double>(in[0].shape.numel());
  return {3.0 * n, 2.0 * n * static_cast<double>(size_of(in[0].dtype))};
}

void Rope::run_cpu(const KernelArgs& args) const {
  const std::int64_t n = args.in[0].shape()[0], half = shape_.head_dim / 2;
  const std::int64_t first = *args.in[2].as<std::int32_t>();
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    T* qkv = args.in[0].as<T>();
    const T* table = args.in[1].as<T>();
    const T sign = direction_ == Direction::forward ? T(1) : T(-1);
    parallel_for(n, 32, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const T* cosine = table + (first + i % shape_.seq_len) * shape_.head_dim;
        const T* sine = cosine + half;
        for (std::int64_t h = 0; h < shape_.heads + shape_.kv_heads; ++h) {
          T* a = qkv + i * shape_.columns() + h * shape_.head_dim;
          T* b = a + half;
          for (std::int64_t d = 0; d < half; ++d) {
            const T x = a[d], y = b[d], s = sign * sine[d];
            a[d] = x * cosine[d] - y * s;
            b[d] = y * cosine[d] + x * s;
          }
        }
      }
    });
  });
}

void fill_rope_table(const Tensor& table, double base) {
  const std::int64_t positions = table.shape()[0], dim = table.shape()[1];
  visit_real(table.dtype(), [&]<typename T>() {
    T* out = table.as<T>();
    for (std::int64_t p = 0; p < positions; ++p)
      for (std::int64_t d = 0; d < dim / 2; ++d) {
        const double angle =
            static_cast<double>(p) * std::pow(base, -2.0 * static_cast<double>(d) / static_cast<double>(dim));
        out[p * dim + d] = static_cast<T>(std::cos(angle));
        out[p * dim + dim / 2 + d] = static_cast<T>(std::sin(angle));
      }
  });
}

}  // namespace kiln

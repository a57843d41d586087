#include "optim/gradient_norm.h"

#include <cmath>
#include <limits>
#include <vector>

#include "catch.h"
#include "core/parallel.h"
#include "graph/parameter.h"

using namespace kiln;

namespace {

struct Result {
  double norm, scale;
};

Result run(const std::vector<HostTensor>& gradients, double clip_norm) {
  const GradientNorm op({.clip_norm = clip_norm});
  const HostTensor scalars(scalars_spec());
  std::vector<Tensor> in;
  std::vector<TensorSpec> specs;
  for (const HostTensor& gradient : gradients) in.push_back(gradient.view());
  in.push_back(scalars.view());
  for (const Tensor& tensor : in) specs.push_back(tensor.spec);
  CHECK(op.infer(specs).empty());
  const HostTensor workspace({{static_cast<std::int64_t>(op.workspace_bytes(specs))}, DType::u8});
  op.run_cpu({.in = in, .out = {}, .workspace = workspace.view()});
  return {scalar(scalars.view(), Scalar::grad_norm), scalar(scalars.view(), Scalar::clip_scale)};
}

HostTensor waves(Shape shape, DType dtype = DType::f32) {
  HostTensor tensor({shape, dtype});
  visit_real(dtype, [&]<typename T>() {
    double phase = 0.1;
    for (T& x : tensor.span<T>()) x = static_cast<T>(std::sin(phase += 0.7));
  });
  return tensor;
}

}  // namespace

TEST_CASE("gradient_norm equals a scalar sum over all gradients, and clips as PyTorch") {
  std::vector<HostTensor> gradients;
  gradients.push_back(waves({3, 5}));
  gradients.push_back(waves({100, 4097}));  // many blocks and a rest
  gradients.push_back(waves({4096}));
  gradients.push_back(waves({9}, DType::f64));
  long double sum = 0;
  for (std::size_t i = 0; i < 3; ++i)
    for (const float x : gradients[i].span<float>()) sum += static_cast<long double>(x) * static_cast<long double>(x);
  for (const double x : gradients[3].span<double>()) sum += static_cast<long double>(x) * static_cast<long double>(x);
  const double expected = static_cast<double>(std::sqrt(sum));

  const Result clipped = run(gradients, 1.0);
  CHECK(clipped.norm == Approx(expected).epsilon(1e-13));
  CHECK(clipped.scale == Approx(1.0 / (expected + 1e-6)).epsilon(1e-13));
  CHECK(run(gradients, 0.0).scale == 1.0);
  CHECK(run(gradients, 2 * expected).scale == 1.0);

  const int threads = thread_count();
  for (const int count : {1, 2, 3, 5}) {
    set_thread_count(count);
    CHECK(run(gradients, 1.0).norm == clipped.norm);
  }
  set_thread_count(threads);
}

TEST_CASE("gradient_norm neither overflows nor hides what is not finite") {
  std::vector<HostTensor> gradients;
  gradients.push_back(waves({70, 70}));
  for (float& x : gradients[0].span<float>()) x *= 1e30f;
  CHECK(std::isfinite(run(gradients, 1.0).norm));
  const std::size_t at = GENERATE(0u, 4095u, 4899u);
  gradients[0].span<float>()[at] = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(run(gradients, 1.0).norm));
  gradients[0].span<float>()[at] = -std::numeric_limits<float>::infinity();
  CHECK(std::isinf(run(gradients, 1.0).norm));
}

TEST_CASE("gradient_norm refuses a negative limit and inputs without scalars") {
  CHECK_THROWS_WITH(GradientNorm({.clip_norm = -1.0}), ContainsSubstring("clip_norm: -1, expected at least 0"));
  const GradientNorm op({.clip_norm = 1.0});
  const std::vector<TensorSpec> specs{{{3, 4}, DType::f32}};
  CHECK_THROWS_WITH(op.infer(specs), ContainsSubstring("the last input must be the step's scalars"));
}

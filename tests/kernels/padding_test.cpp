// Members whose update follows the sizes of a matrix, on a GPU that pads it with zeros.
#include "kernels/cuda_backend.h"
#include "kernels/update_family.h"

namespace kiln::test {
namespace {

/// A matrix of one shape as the upper left part of another; the rest is zero or cut off.
std::vector<float> resized(const std::vector<float>& values, const Shape& from, const Shape& to) {
  std::vector<float> out(static_cast<std::size_t>(to.numel()), 0.0f);
  for (std::int64_t i = 0; i < std::min(from[0], to[0]); ++i)
    for (std::int64_t j = 0; j < std::min(from[1], to[1]); ++j)
      out[static_cast<std::size_t>(i * to[1] + j)] = values[static_cast<std::size_t>(i * from[1] + j)];
  return out;
}

TEST_CASE("padding changes no update, and stays zero", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const std::vector<Shape> own{{200, 136}, {136, 200}, {136, 36}}, stored{{256, 136}, {136, 256}, {136, 64}};
  for (const OptimizerKind kind :
       {OptimizerKind::muon, OptimizerKind::apollo_mini, OptimizerKind::lora, OptimizerKind::relora}) {
    const OptimizerOptions o{.kind = kind, .eps = 1e-3, .weight_decay = 0.1, .rank = 8, .alpha = 8, .refresh = 3};
    Family device(*gpu, o, DType::f32, stored, true, own), host(cpu_backend(), o, DType::f32, own);
    for (std::size_t i = 0; i < own.size(); ++i) {
      const std::vector<float> w = normals(own[i].numel(), i + 1, 0.02);
      host.set_weights(i, w);
      device.set_weights(i, resized(w, own[i], stored[i]));
    }
    for (int step = 1; step <= 3; ++step) {
      for (std::size_t i = 0; i < own.size(); ++i) {
        const std::vector<float> g = gradient_of(own[i], i, step);
        host.set_gradient(i, g);
        device.set_gradient(i, resized(g, own[i], stored[i]));
      }
      device.step(step);
      host.step(step);
    }
    for (std::size_t i = 0; i < own.size(); ++i) {
      INFO(to_string(kind) << ", " << own[i].str() << " stored as " << stored[i].str());
      const std::vector<float> found = device.weights(i), part = resized(found, stored[i], own[i]);
      CHECK(resized(part, own[i], stored[i]) == found);  // nothing but zeros around
      const std::vector<float> before = normals(own[i].numel(), i + 1, 0.02), after = host.weights(i);
      std::vector<double> change, expected;
      for (std::size_t e = 0; e < part.size(); ++e) {
        change.push_back(static_cast<double>(part[e]) - static_cast<double>(before[e]));
        expected.push_back(static_cast<double>(after[e]) - static_cast<double>(before[e]));
      }
      // As without padding: Muon's iteration runs in bf16 (muon_test.cpp), LoRA's products do.
      CHECK(relative_error(change, expected) <= (kind == OptimizerKind::muon ? 0.05 : 1e-2));
    }
  }
}

}  // namespace
}  // namespace kiln::test

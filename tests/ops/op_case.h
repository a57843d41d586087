#pragma once
#include <functional>
#include <string>
#include <vector>

#include "graph/executor.h"

namespace kiln::test {

/// One op, one set of shapes. Real inputs are declared f64 and filled at random; the f32 run converts them.
struct OpCase {
  std::string name;
  OpPtr op;
  std::vector<TensorSpec> inputs;
  std::vector<int> gradients{};  // inputs to differentiate
  bool loss = false;             // output 0 is a loss with its own seed (classifier), else a random seed is fed
  double f32_tolerance = 1e-5;   // of the largest reference value
  /// Fills the inputs that are not random reals (tokens, tables, scalars).
  std::function<void(std::vector<HostTensor>&)> prepare{};
  /// What the op should give, in f64: its first output, or its first input for an op in place.
  std::function<std::vector<double>(const std::vector<HostTensor>&)> reference{};
};

/// Forward in f64 and f32 against the reference, in a poisoned arena, so that what an op forgets to write shows.
void check_forward(const OpCase& c);
/// The gradient rule against fp64 central differences, to 1e-6 relative in norm for each input.
void check_gradients(const OpCase& c);

/// Uniform in [-1, 1], a function of seed and index alone.
std::vector<double> random_values(std::int64_t count, std::uint64_t seed);

}  // namespace kiln::test

#include "base/decay_shape.h"

#include <array>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace kiln {
namespace {

struct Named {
  std::string_view name;
  DecayShape shape;
};
constexpr std::array<Named, 3> kShapes{
    {{"linear", DecayShape::linear}, {"cosine", DecayShape::cosine}, {"1-sqrt", DecayShape::one_minus_sqrt}}};

}  // namespace

double decay_at(DecayShape shape, double x) {
  switch (shape) {
    case DecayShape::linear:
      return 1.0 - x;
    case DecayShape::cosine:
      return 0.5 * (1.0 + std::cos(std::numbers::pi * x));
    case DecayShape::one_minus_sqrt:
      return 1.0 - std::sqrt(x);
  }
  return 0.0;
}

std::string_view to_string(DecayShape shape) {
  for (const Named& named : kShapes)
    if (named.shape == shape) return named.name;
  return "unknown";
}

DecayShape parse_decay_shape(std::string_view name) {
  for (const Named& named : kShapes)
    if (named.name == name) return named.shape;
  fail(ExitCode::usage, "decay shape '{}' is not known; choose linear, cosine or 1-sqrt", name);
}

}  // namespace kiln

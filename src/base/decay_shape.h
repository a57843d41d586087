#pragma once
#include <string_view>

namespace kiln {

/// A decay from 1 at x = 0 to 0 at x = 1: 1 - x, (1 + cos(pi x)) / 2, 1 - sqrt(x). Learning-rate schedules and the
/// merges that stand for them share it.
enum class DecayShape { linear, cosine, one_minus_sqrt };

double decay_at(DecayShape shape, double x);

/// "linear", "cosine", "1-sqrt"; a usage Error lists what exists.
std::string_view to_string(DecayShape shape);
DecayShape parse_decay_shape(std::string_view name);

}  // namespace kiln

#include "optim/optimizer.h"

#include <array>
#include <cmath>

#include "optim/adam.h"
#include "optim/apollo.h"
#include "optim/lora.h"
#include "optim/low_rank_adam.h"
#include "optim/muon.h"

namespace kiln {
namespace {

struct NamedKind {
  std::string_view name;
  OptimizerKind kind;
};
constexpr std::array<NamedKind, 10> kKinds{{{"adamw", OptimizerKind::adamw},
                                            {"adam8bit", OptimizerKind::adam8bit},
                                            {"galore", OptimizerKind::galore},
                                            {"fira", OptimizerKind::fira},
                                            {"fira+", OptimizerKind::fira_plus},
                                            {"apollo", OptimizerKind::apollo},
                                            {"apollo_mini", OptimizerKind::apollo_mini},
                                            {"muon", OptimizerKind::muon},
                                            {"lora", OptimizerKind::lora},
                                            {"relora", OptimizerKind::relora}}};

void check_options(const OptimizerOptions& o) {
  auto fraction = [](std::string_view key, double value) {
    check(value >= 0 && value < 1, "optimizer.{}: {}, expected at least 0 and less than 1", key, value);
  };
  fraction("beta1", o.beta1);
  fraction("beta2", o.beta2);
  check(o.eps > 0, "optimizer.eps: {}, expected a positive number", o.eps);
  check(o.weight_decay >= 0, "optimizer.weight_decay: {}, expected at least 0", o.weight_decay);
  if (o.kind == OptimizerKind::adamw) return;
  check(o.kind != OptimizerKind::adam8bit || o.states == StatePrecision::int8,
        "optimizer.kind: adam8bit has int8 states; leave optimizer.states out, or use kind adamw");
  if (o.kind == OptimizerKind::adam8bit) return;
  if (o.kind == OptimizerKind::muon) return fraction("momentum", o.momentum);
  check(o.rank >= 1, "optimizer.rank: {}, expected at least 1", o.rank);
  check(o.refresh >= 1, "optimizer.refresh: {}, expected at least 1", o.refresh);
  check(o.alpha > 0, "optimizer.alpha: {}, expected a positive number", o.alpha);
  check(o.gamma >= 1, "optimizer.gamma: {}, expected at least 1", o.gamma);
  check(o.rewarm >= 0, "optimizer.rewarm: {}, expected at least 0", o.rewarm);
}

}  // namespace

// Inputs of the node: storage of w, storage of g, scalars, then the parameter's states.
std::vector<TensorSpec> UpdateOp::infer(std::span<const TensorSpec> in) const {
  const std::vector<StateSpec> states = state_specs();
  const bool low = in.size() == 4 + states.size() && in[0].dtype == DType::bf16;
  check(low || in.size() == 3 + states.size(), "{}: {} inputs, expected {}", parameter_.name, in.size(),
        3 + states.size());
  check(in[0].shape == in[1].shape, "{}: weights {} and gradient {} differ in shape", parameter_.name,
        in[0].shape.str(), in[1].shape.str());
  check(in[1].dtype == accumulator_of(in[0].dtype) || in[1].dtype == in[0].dtype,
        "{}: gradient of {} for weights of {}", parameter_.name, to_string(in[1].dtype), to_string(in[0].dtype));
  if (low)
    check(in.back().shape == in[0].shape && in.back().dtype == DType::u16, "{}: low halves {} {}, expected u16 {}",
          parameter_.name, to_string(in.back().dtype), in.back().shape.str(), in[0].shape.str());
  check(in[2] == scalars_spec(), "{}: the third input must be the step's scalars", parameter_.name);
  const Shape &storage = in[0].shape, &shape = parameter_.shape;
  bool fits = storage.rank() == shape.rank() && parameter_.row_begin + shape[0] <= storage[0];
  for (int axis = 1; fits && axis < shape.rank(); ++axis) fits = storage[axis] == shape[axis];
  check(fits, "{}: {} from row {} does not fit its storage {}", parameter_.name, shape.str(), parameter_.row_begin,
        storage.str());
  for (std::size_t s = 0; s < states.size(); ++s) {
    const TensorSpec& found = in[3 + s];
    const DType dtype = states[s].spec.dtype;
    const TensorSpec expected{states[s].spec.shape,
                              in[0].dtype == DType::f64 && dtype == DType::f32 ? DType::f64 : dtype};
    check(found == expected, "{}.{}: {} {}, expected {} {}", parameter_.name, states[s].name, to_string(found.dtype),
          found.shape.str(), to_string(expected.dtype), expected.shape.str());
  }
  return {};
}

std::vector<int> UpdateOp::mutates() const {
  std::vector<int> list{0, 1};
  // States, and the masters' low halves where there are any.
  for (std::size_t s = 0; s < state_specs().size(); ++s) list.push_back(static_cast<int>(3 + s));
  return list;
}

UpdateArgs UpdateOp::arguments(const KernelArgs& args) const {
  const std::int64_t rows = parameter_.shape[0];
  const bool low = args.in.back().dtype() == DType::u16;
  const std::size_t states = args.in.size() - 3 - (low ? 1 : 0);
  return {.w = args.in[0].rows(parameter_.row_begin, rows),
          .g = args.in[1].rows(parameter_.row_begin, rows),
          .low = low ? args.in.back().rows(parameter_.row_begin, rows) : Tensor{},
          .states = args.in.subspan(3, states),
          .scalars = args.in[2],
          .workspace = args.workspace};
}

void UpdateOp::run_cpu(const KernelArgs& args) const {
  if (std::isfinite(scalar(args.in[2], Scalar::grad_norm))) update(arguments(args));
}

std::size_t Optimizer::state_bytes(const Parameter& parameter) const {
  std::size_t total = 0;
  for (const StateSpec& state : states(parameter)) total += state.spec.bytes();
  return total;
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options) {
  check_options(options);
  switch (options.kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::adam8bit:
      return make_adamw(options);
    case OptimizerKind::galore:
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
      return make_low_rank_adam(options);
    case OptimizerKind::apollo:
    case OptimizerKind::apollo_mini:
      return make_apollo(options);
    case OptimizerKind::muon:
      return make_muon(options);
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return make_lora(options);
  }
  fail(ExitCode::usage, "unknown optimizer kind {}", static_cast<int>(options.kind));
}

OptimizerDefaults optimizer_defaults(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::muon:
      break;
    case OptimizerKind::adam8bit:
      return {.states = StatePrecision::int8};
    case OptimizerKind::galore:
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
      return {.eps = 1e-6};
    case OptimizerKind::apollo:
      return {.eps = 1e-6, .alpha = 1};
    case OptimizerKind::apollo_mini:
      return {.eps = 1e-6, .alpha = 128};
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return {.alpha = 32};
  }
  return {};
}

bool has_rank(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::galore:
    case OptimizerKind::fira:
    case OptimizerKind::fira_plus:
    case OptimizerKind::apollo:
    case OptimizerKind::lora:
    case OptimizerKind::relora:
      return true;
    default:
      return false;
  }
}

std::vector<OptimizerKind> optimizer_kinds() {
  std::vector<OptimizerKind> kinds;
  for (const NamedKind& kind : kKinds) kinds.push_back(kind.kind);
  return kinds;
}

OptimizerKind parse_optimizer_kind(std::string_view name) {
  std::string known;
  for (const NamedKind& kind : kKinds) {
    if (kind.name == name) return kind.kind;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", kind.name);
  }
  fail(ExitCode::usage, "optimizer.kind: '{}' is not known; choose one of {}", name, known);
}

std::string_view to_string(StatePrecision precision) {
  switch (precision) {
    case StatePrecision::fp32:
      return "fp32";
    case StatePrecision::bf16:
      return "bf16";
    case StatePrecision::int8:
      return "int8";
  }
  return "unknown";
}

std::string_view to_string(OptimizerKind kind) {
  for (const NamedKind& named : kKinds)
    if (named.kind == kind) return named.name;
  return "unknown";
}

}  // namespace kiln

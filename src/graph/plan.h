#pragma once
#include <map>
#include <span>
#include <string>
#include <vector>

#include "graph/op.h"

namespace kiln {

/// Index of a value in its plan; invalid by default.
struct ValueId {
  int index = -1;
  bool valid() const { return index >= 0; }
  bool operator==(const ValueId&) const = default;
  auto operator<=>(const ValueId&) const = default;
};

/// Why a value exists; `kiln plan` adds bytes up by it.
enum class Role { parameter, gradient, state, activation, workspace, input };
inline constexpr std::size_t kRoleCount = 6;
std::string_view to_string(Role role);

/// Nodes of `micro` run once a micro-batch; nodes of `update` once a step, after the last micro-batch.
enum class Phase { micro, update };

struct Value {
  std::string name;
  TensorSpec spec;
  Role role = Role::activation;
  bool external = false;        // bound by the caller; otherwise it lives in the arena
  bool kept = false;            // read after the run, so its bytes are not reused
  bool needs_gradient = false;  // a parameter, or computed from one
  bool recomputed = false;      // gradient nodes read a copy, so that its bytes are free after the forward part
};

struct Node {
  OpPtr op;
  std::vector<ValueId> in, out;
  Phase phase = Phase::micro;
};

/// A list of ops in order of execution, recorded once per shape. Record the model, call backward(), record the updates,
/// then seal it into an Executor. Not thread-safe.
class Plan {
 public:
  /// A value whose memory the caller binds: parameters, optimizer states, tokens, scalars.
  ValueId external(std::string name, TensorSpec spec, Role role);
  /// Appends a node; its outputs are named `name`, `name.1`, ... A usage Error when the op refuses the shapes.
  std::vector<ValueId> add(OpPtr op, std::vector<ValueId> in, const std::string& name);
  /// add() for an op with exactly one output.
  ValueId add1(OpPtr op, std::vector<ValueId> in, const std::string& name);

  /// Appends the gradient nodes of everything that led to `loss` (whose op defines its own seed, see classifier.h),
  /// in reverse order. Afterwards gradient(p) is valid for every parameter that was used.
  void backward(ValueId loss);
  /// The gradient of a value after backward(); invalid if it has none.
  ValueId gradient(ValueId value) const;

  /// Before backward(): gradient nodes shall not read this value but a copy, computed again right before the first of
  /// them by the nodes that wrote it, from what is not marked. The same kernels on the same inputs give the same bits.
  void recompute(ValueId value);

  /// Moves the last node up to right after the last one that it depends on, or whose inputs it changes; from there down
  /// to the next node that writes a parameter's gradient, so that neighbours which a device takes together stay so.
  void move_up();

  /// Marks a value as read after the run.
  void keep(ValueId value);
  /// Nodes recorded from now on belong to `phase`; a plan cannot return from update to micro.
  void set_phase(Phase phase);

  const std::vector<Value>& values() const { return values_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const Value& value(ValueId id) const { return values_[static_cast<std::size_t>(id.index)]; }
  std::vector<TensorSpec> input_specs(const Node& node) const;
  /// FLOPs and least bytes of all nodes of a phase.
  Cost cost(Phase phase) const;
  bool is_parameter_gradient(ValueId id) const;

 private:
  friend class GradientContext;
  ValueId new_value(Value value);
  ValueId for_gradient(ValueId value);
  void run_again(std::size_t node);

  std::vector<Value> values_;
  std::vector<Node> nodes_;
  std::map<ValueId, ValueId> gradients_;                 // value -> its gradient
  std::map<ValueId, ValueId> parameter_gradients_;       // gradient -> its parameter
  std::map<ValueId, ValueId> copies_;                    // recomputed value -> what gradient nodes read
  std::map<ValueId, std::vector<std::size_t>> writers_;  // forward nodes that write a value, in order
  Phase phase_ = Phase::micro;
};

/// What an op's gradient rule sees: one node of the forward part, and the gradients of its outputs.
class GradientContext {
 public:
  GradientContext(Plan& plan, std::size_t node) : plan_(plan), node_(node) {}
  ValueId in(int i) const;
  ValueId out(int i) const;
  const TensorSpec& in_spec(int i) const { return plan_.value(in(i)).spec; }
  bool needs_gradient(int i) const { return plan_.value(in(i)).needs_gradient; }
  bool is_recomputed(ValueId value) const { return plan_.value(value).recomputed; }
  /// Gradient of output i or of input i so far; invalid when none has arrived.
  ValueId grad_out(int i) const { return plan_.gradient(out(i)); }
  ValueId grad_in(int i) const { return plan_.gradient(in(i)); }
  /// Appends a gradient node; of recomputed inputs it reads the copies.
  std::vector<ValueId> add(OpPtr op, std::vector<ValueId> inputs, const std::string& name);
  /// Declares the gradient of input i. A second contribution must be added by the op itself to grad_in(i): calling this
  /// when one exists is a usage Error.
  void set_grad_in(int i, ValueId gradient);
  /// Declares a gradient of input i that already takes in grad_in(i).
  void replace_grad_in(int i, ValueId gradient);

 private:
  Plan& plan_;
  std::size_t node_;
};

}  // namespace kiln

#pragma once
#include <memory>
#include <vector>

#include "dist/communicator.h"
#include "model/llama.h"
#include "optim/optimizer.h"

namespace kiln {

struct TrainPlanOptions {
  LlamaConfig model;
  OptimizerOptions optimizer;
  BatchShape micro;        // one micro-batch of one rank
  int micro_batches = 1;   // a step, on each rank
  double clip_norm = 1.0;  // 0: no clipping
  StorageLayout layout = DType::f32;
  Recomputation recompute = {};
  bool masters = false;  // bf16 weights are the upper halves of f32 masters
  /// Each update right after its gradient, so that the gradients never live together. A usage Error with more than one
  /// micro-batch, whose gradients must add up first, or with clipping, which waits for the norm of them all.
  bool update_in_backward = false;
};

/// A whole training step as a plan: forward and backward in the micro phase; all-reduce, global norm, clipping and the
/// updates in the update phase, or between the nodes of backward. Nothing is allocated; `kiln plan` packs it and the
/// trainer binds and runs it.
struct TrainPlan {
  Plan plan;
  StorageLayout layout = DType::f32;
  ParameterTable table;  // in the layout's sizes
  std::unique_ptr<Optimizer> optimizer;
  LlamaValues values;
  std::vector<ValueId> lows;                        // with masters: their low halves, by storage
  std::vector<std::vector<StateSpec>> state_specs;  // by parameter
  std::vector<std::vector<ValueId>> states;         // by parameter, as state_specs

  std::size_t parameter_bytes() const;
  std::size_t state_bytes() const;
};

/// The first parameter whose 8-bit states padding would cut into other blocks than files have; empty when there is
/// none.
std::string padded_codes(const LlamaConfig& model, const Optimizer& optimizer, const StorageLayout& layout);

/// Records the plan; every rank records the same one. The communicator must outlive it.
TrainPlan record_train_plan(const TrainPlanOptions& options, Communicator& communicator);

/// Memory of all optimizer states, zeroed, and their one list for saving, loading and counting.
class OptimizerStates {
 public:
  OptimizerStates(const ParameterTable& table, const Optimizer& optimizer);
  /// Calls visit(name, tensor) for each state: "model.layers.0.self_attn.q_proj.weight.exp_avg".
  template <typename F>
  void visit(F&& f) const {
    for (const Named& state : states_) f(state.name, state.tensor.view());
  }
  Tensor tensor(std::size_t parameter, std::size_t state) const {
    return states_[first_[parameter] + state].tensor.view();
  }
  std::size_t bytes() const;

 private:
  struct Named {
    std::string name;
    HostTensor tensor;
  };
  std::vector<Named> states_;
  std::vector<std::size_t> first_;  // by parameter
};

}  // namespace kiln

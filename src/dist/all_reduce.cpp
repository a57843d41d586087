#include "dist/all_reduce.h"

namespace kiln {

std::vector<TensorSpec> AllReduce::infer(std::span<const TensorSpec> in) const {
  check(in.size() == 1, "all_reduce: expected one input, found {}", in.size());
  return {};
}

std::size_t AllReduce::workspace_bytes(std::span<const TensorSpec> in) const {
  return communicator_.scratch_bytes(in[0]);
}

void AllReduce::run_cpu(const KernelArgs& args) const { communicator_.all_reduce_sum(args.in[0], args.workspace); }

}  // namespace kiln

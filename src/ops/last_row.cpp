#include "ops/last_row.h"

#include <cstring>

#include "ops/checks.h"

namespace kiln {

std::vector<TensorSpec> LastRow::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 1);
  expect_rank(name(), "x", in[0], 2);
  check(in[0].shape[0] >= 1, "last_row: x has no rows");
  return {{{1, in[0].shape[1]}, in[0].dtype}};
}

void LastRow::run_cpu(const KernelArgs& args) const {
  const Tensor last = args.in[0].rows(args.in[0].shape()[0] - 1, 1);
  std::memcpy(args.out[0].data, last.data, last.bytes());
}

}  // namespace kiln

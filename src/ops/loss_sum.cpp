#include "ops/loss_sum.h"

#include "graph/parameter.h"
#include "ops/checks.h"

namespace kiln {

std::vector<TensorSpec> LossSum::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 2);
  expect_rank(name(), "losses", in[0], 1);
  check(in[1] == scalars_spec(), "loss_sum: the second input must be the step's scalars");
  return {};
}

void LossSum::run_cpu(const KernelArgs& args) const {
  double& total = scalar(args.in[1], Scalar::loss);
  if (!args.accumulate) total = 0;
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    for (const T loss : args.in[0].span<T>()) total += static_cast<double>(loss);
  });
}

}  // namespace kiln

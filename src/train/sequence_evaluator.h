#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "graph/executor.h"
#include "io/dataset.h"
#include "model/llama.h"

namespace kiln {

/// Loss of each sequence of a data set, where Evaluator gives their mean: models compared sequence by sequence need far
/// fewer of them. On the CPU, fp32. Plan and memory are made once; the weights may change between runs and must outlive
/// it. Not thread-safe.
class SequenceEvaluator {
 public:
  /// `sequences` in one forward pass.
  SequenceEvaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len);

  struct Loss {
    double nats = 0;           // summed over the targets, in fp64
    std::int64_t targets = 0;  // that were counted
  };
  /// Samples [0, samples) of `data`, in order.
  std::vector<Loss> run(const Dataset& data, std::int64_t samples);

 private:
  BatchShape shape_;
  Plan plan_;
  LlamaValues values_;
  HostTensor tokens_, targets_, first_, rope_table_, scalars_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace kiln

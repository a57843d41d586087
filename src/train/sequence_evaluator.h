#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "graph/executor.h"
#include "io/dataset.h"
#include "model/llama.h"
#include "train/device_memory.h"

namespace kiln {

/// Loss of each sequence of a data set, where Evaluator gives their mean: models compared sequence by sequence need far
/// fewer of them. On the CPU in f32; on a GPU from weights rounded to bf16 and in bf16 products with f32 sums. Plan and
/// memory are made once; the weights may change between runs and must outlive it. Not thread-safe.
class SequenceEvaluator {
 public:
  /// `sequences` in one forward pass. Sees what the device's weights hold: push() brings the host's there.
  SequenceEvaluator(const DeviceWeights& weights, std::int64_t sequences, std::int64_t seq_len);
  /// On the CPU in f32.
  SequenceEvaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len);

  struct Loss {
    double nats = 0;           // summed over the targets, in fp64
    std::int64_t targets = 0;  // that were counted
  };
  /// Samples [0, samples) of `data`, in order.
  std::vector<Loss> run(const Dataset& data, std::int64_t samples);

 private:
  SequenceEvaluator(std::unique_ptr<const DeviceWeights> owned, std::int64_t sequences, std::int64_t seq_len);

  std::unique_ptr<const DeviceWeights> owned_;  // when made from a host model
  Backend& backend_;
  BatchShape shape_;
  std::vector<std::int32_t> tokens_, targets_;  // of one pass
  std::vector<float> losses_;
  ModelInputs inputs_;
  Plan plan_;
  LlamaValues values_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace kiln

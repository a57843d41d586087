#pragma once
#include <memory>

#include "dist/communicator.h"
#include "graph/executor.h"
#include "io/dataset.h"
#include "model/llama.h"
#include "train/device_memory.h"

namespace kiln {

struct Evaluation {
  double loss = 0;          // nats per token, summed in fp64
  std::int64_t tokens = 0;  // targets that were counted
  double perplexity() const;
};

/// Mean loss of weights over the first samples of a data set. Plan and memory are made once.
class Evaluator {
 public:
  /// `sequences` in one forward pass of a rank. The weights must outlive the evaluator, which sees what they hold.
  Evaluator(const DeviceWeights& weights, std::int64_t sequences, std::int64_t seq_len);
  /// On the CPU in f32.
  Evaluator(const ModelWeights& weights, std::int64_t sequences, std::int64_t seq_len);

  /// Samples [0, samples) of `data`, shared out over ranks; what does not fill a pass is masked, so the count is exact.
  Evaluation run(const Dataset& data, std::int64_t samples, Communicator& communicator);

  std::size_t arena_bytes() const { return executor_->packing().arena_bytes; }

 private:
  Evaluator(std::unique_ptr<const DeviceWeights> owned, std::int64_t sequences, std::int64_t seq_len);
  void load(const Dataset& data, std::int64_t first, std::int64_t end);

  std::unique_ptr<const DeviceWeights> owned_;  // when made from a host model
  Backend& backend_;
  BatchShape shape_;
  std::vector<std::int32_t> tokens_, targets_;  // of one pass
  ModelInputs inputs_;
  Plan plan_;
  LlamaValues values_;
  std::unique_ptr<Executor> executor_;
};

/// Samples that hold `tokens` tokens, at least one, at most one epoch.
std::int64_t samples_for_tokens(const Dataset& data, std::int64_t tokens);

}  // namespace kiln

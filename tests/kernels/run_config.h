#pragma once
#include <string>

#include "base/rng.h"
#include "io/corpus_fixture.h"
#include "train/config.h"

namespace kiln::test {

/// A run of 12 steps of a small model on the GPU, on a shard that it writes; `rest` is further YAML.
inline Config run_config(const Scratch& scratch, const std::string& weights, const std::string& rest) {
  const Philox random(3, 3);
  std::vector<std::int32_t> text;
  for (std::uint64_t i = 0; i < 8000; ++i)
    text.push_back(static_cast<std::int32_t>((i * 5 + random.bits(i) % 3) % 1000));
  write_shard(scratch / "train.bin", text, 1000);
  return parse_config(fmt::format("run: {{dir: {0}/run, seed: 3, device: cuda}}\n"
                                  "model: {{hidden: 128, ffn: 200, heads: 4, kv_heads: 2, layers: 2, vocab: 1000}}\n"
                                  "data: {{train: {0}/train.bin, valid: {0}/train.bin, seq_len: 33}}\n"
                                  "batch: {{sequences: 12, micro: 3}}\n"
                                  "precision: {{weights: {1}}}\n{2}",
                                  scratch.path().string(), weights, rest),
                      "test.yaml", {});
}

}  // namespace kiln::test

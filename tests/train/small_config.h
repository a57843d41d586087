#pragma once
#include <string>

#include "train/config.h"

namespace kiln::test {

/// A model of two layers on data that is never read; `rest` is further YAML.
inline Config small_config(const std::string& rest = "") {
  return parse_config(
      "run: {dir: unused}\n"
      "model: {hidden: 64, ffn: 176, heads: 4, layers: 2, vocab: 100}\n"
      "data: {train: unused.bin, seq_len: 32}\n"
      "batch: {sequences: 64}\n" +
          rest,
      "test.yaml", {});
}

}  // namespace kiln::test

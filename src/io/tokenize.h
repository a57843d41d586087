#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kiln {

struct TokenizeOptions {
  std::vector<std::filesystem::path> inputs;  // .txt or .jsonl
  std::filesystem::path out;                  // directory
  std::int64_t train_vocab = 0;               // train a tokenizer of this many pieces on the inputs ...
  std::filesystem::path tokenizer;            // ... or load this one; exactly one of the two
  std::int64_t shard_tokens = 100'000'000;
  std::string prefix = "train";
};

struct TokenizeResult {
  std::int64_t documents = 0, bytes = 0, tokens = 0, vocab = 0;
  std::vector<std::filesystem::path> shards;
};

/// Encodes a corpus into `OUT/PREFIX_000.bin`, `_001`, ... (later ones of an earlier run are removed) and leaves the
/// tokenizer as `OUT/tokenizer.model`. A .txt file holds documents separated by lines with a form feed alone; a .jsonl
/// file one {"text": ...} a line. Each document is followed by EOS, so packed sequences know its end. A data Error
/// names the file (and line) that is missing, empty or not valid.
TokenizeResult tokenize_corpus(const TokenizeOptions& options);

}  // namespace kiln

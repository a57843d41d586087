#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kiln {

/// A SentencePiece model.
class Tokenizer {
 public:
  /// A data Error when the file is missing or is no SentencePiece model.
  explicit Tokenizer(const std::filesystem::path& model);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  std::vector<std::int32_t> encode(std::string_view text) const;
  std::string decode(const std::vector<std::int32_t>& tokens) const;
  std::int64_t vocab_size() const;
  std::int32_t bos() const;  // -1 when the model has none
  std::int32_t eos() const;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct TokenizerTraining {
  std::vector<std::filesystem::path> inputs;  // text, one sentence or paragraph a line
  std::filesystem::path model;                // output, `X.model`
  std::int64_t vocab_size = 32000;
  std::int64_t max_sentences = 2'000'000;
};
/// Trains BPE with byte fall-back, identity normalisation, unk 0, bos 1, eos 2.
void train_tokenizer(const TokenizerTraining& options);

}  // namespace kiln

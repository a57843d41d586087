#include "io/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <unordered_map>

#include "base/error.h"

namespace kiln {

struct Tokenizer::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

Tokenizer::Tokenizer(const std::filesystem::path& model) : path_(model), impl_(std::make_unique<Impl>()) {
  const auto status = impl_->processor.Load(model.string());
  if (!status.ok())
    fail(ExitCode::data, "{}: not a SentencePiece model ({}); give the tokenizer.model of the corpus", model.string(),
         status.message());
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int> ids;
  const auto status = impl_->processor.Encode(std::string(text), &ids);
  if (!status.ok()) fail(ExitCode::data, "{}: cannot encode the text ({})", path_.string(), status.message());
  return {ids.begin(), ids.end()};
}

std::string Tokenizer::decode(const std::vector<std::int32_t>& tokens) const {
  std::string text;
  const auto status = impl_->processor.Decode(std::vector<int>(tokens.begin(), tokens.end()), &text);
  if (!status.ok()) fail(ExitCode::data, "{}: cannot decode the tokens ({})", path_.string(), status.message());
  return text;
}

std::int64_t Tokenizer::vocab_size() const { return impl_->processor.GetPieceSize(); }
std::int32_t Tokenizer::bos() const { return impl_->processor.bos_id(); }
std::int32_t Tokenizer::eos() const { return impl_->processor.eos_id(); }

namespace {

/// The trainer takes its inputs as one line of comma-separated values.
std::string csv_line(const std::vector<std::filesystem::path>& paths) {
  std::string line;
  for (const std::filesystem::path& path : paths) {
    line += line.empty() ? "\"" : ",\"";
    for (const char c : path.string()) line += c == '"' ? std::string("\"\"") : std::string(1, c);
    line += '"';
  }
  return line;
}

}  // namespace

void train_tokenizer(const TokenizerTraining& options) {
  const std::filesystem::path prefix = std::filesystem::path(options.model).replace_extension();
  if (prefix.has_parent_path()) std::filesystem::create_directories(prefix.parent_path());
  // Named settings, not a command line: that would part paths at blanks, and be logged before minloglevel is read.
  const std::unordered_map<std::string, std::string> settings{
      {"minloglevel", "2"},
      {"input", csv_line(options.inputs)},
      {"model_prefix", prefix.string()},
      {"vocab_size", std::to_string(options.vocab_size)},
      {"model_type", "bpe"},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"split_digits", "true"},
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "-1"},
      {"character_coverage", "0.9995"},
      {"input_sentence_size", std::to_string(options.max_sentences)},
      {"shuffle_input_sentence", "true"},
      {"max_sentence_length", "16384"},
      {"num_threads", "4"},
      {"hard_vocab_limit", "true"}};
  const auto status = sentencepiece::SentencePieceTrainer::Train(settings);
  if (!status.ok())
    fail(ExitCode::data, "{}: training a tokenizer of {} pieces failed ({})", options.model.string(),
         options.vocab_size, status.message());
  std::filesystem::remove(prefix.string() + ".vocab");
  if (prefix.string() + ".model" != options.model.string())
    std::filesystem::rename(prefix.string() + ".model", options.model);
}

}  // namespace kiln

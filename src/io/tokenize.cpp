#include "io/tokenize.h"

#include <unistd.h>

#include <fstream>
#include <functional>
#include <memory>

#include "base/error.h"
#include "base/json.h"
#include "base/log.h"
#include "io/shard.h"
#include "io/tokenizer.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;
using Document = std::function<void(const std::string&)>;

void each_text_document(std::ifstream& in, const Document& visit) {
  std::string line, document;
  while (std::getline(in, line)) {
    if (line == "\f") {
      if (!document.empty()) visit(document);
      document.clear();
      continue;
    }
    document += line;
    document += '\n';
  }
  if (!document.empty()) visit(document);
}

void each_json_document(std::ifstream& in, const fs::path& path, const Document& visit) {
  std::string line;
  for (std::int64_t number = 1; std::getline(in, line); ++number) {
    if (line.empty()) continue;
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_object() || !json.contains("text") || !json["text"].is_string())
      fail(ExitCode::data, "{}:{}: not a JSON object with a \"text\" string; mend or remove the line", path.string(),
           number);
    visit(json["text"].get_ref<const std::string&>());
  }
}

/// Calls visit for each document; returns how many there were.
std::int64_t each_document(const fs::path& path, const Document& visit) {
  std::ifstream in(path, std::ios::binary);
  if (!in || !fs::is_regular_file(path)) fail(ExitCode::data, "{}: cannot be read; check the path", path.string());
  std::int64_t count = 0;
  const Document counted = [&](const std::string& text) {
    ++count;
    visit(text);
  };
  if (path.extension() == ".jsonl")
    each_json_document(in, path, counted);
  else
    each_text_document(in, counted);
  if (count == 0) fail(ExitCode::data, "{}: holds no document, expected text", path.string());
  return count;
}

/// A file of text alone for the trainer, removed with the object: it reads lines, not documents.
struct TrainingText {
  fs::path path;
  explicit TrainingText(const TokenizeOptions& options)
      : path(options.out / fmt::format("tokenizer.tmp-{}.txt", ::getpid())) {
    std::ofstream out(path, std::ios::binary);
    for (const fs::path& input : options.inputs)
      each_document(input, [&](const std::string& text) { out << text << '\n'; });
    out.flush();
    if (!out) fail(ExitCode::resource, "{}: writing failed; free some space and try again", path.string());
  }
  ~TrainingText() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
  TrainingText(const TrainingText&) = delete;
  TrainingText& operator=(const TrainingText&) = delete;
};

Tokenizer prepare_tokenizer(const TokenizeOptions& options) {
  const fs::path model = options.out / "tokenizer.model";
  if (options.train_vocab > 0) {
    const TrainingText text(options);
    train_tokenizer({.inputs = {text.path}, .model = model, .vocab_size = options.train_vocab});
  } else if (!fs::exists(model) || !fs::equivalent(options.tokenizer, model)) {
    if (!fs::is_regular_file(options.tokenizer))
      fail(ExitCode::data, "{}: no such tokenizer; check the path or train one", options.tokenizer.string());
    fs::copy_file(options.tokenizer, model, fs::copy_options::overwrite_existing);
  }
  return Tokenizer(model);
}

fs::path shard_path(const TokenizeOptions& options, std::size_t index) {
  return options.out / fmt::format("{}_{:03}.bin", options.prefix, index);
}

}  // namespace

TokenizeResult tokenize_corpus(const TokenizeOptions& options) {
  check(!options.inputs.empty(), "tokenize: no input; give text files with --input");
  check((options.train_vocab > 0) != !options.tokenizer.empty(),
        "tokenize: give either --train-vocab or --tokenizer, exactly one of them");
  check(options.shard_tokens >= 1, "tokenize: --shard-tokens {}, expected at least 1", options.shard_tokens);
  for (const fs::path& input : options.inputs)
    if (!fs::is_regular_file(input)) fail(ExitCode::data, "{}: no such file; check the path", input.string());
  fs::create_directories(options.out);
  const Tokenizer tokenizer = prepare_tokenizer(options);
  if (tokenizer.eos() < 0)
    fail(ExitCode::data, "{}: has no EOS piece, which ends each document", tokenizer.path().string());

  TokenizeResult result;
  result.vocab = tokenizer.vocab_size();
  std::unique_ptr<TokenShardWriter> writer;
  auto close = [&] {
    if (writer) writer->finish();
    writer.reset();
  };
  for (const fs::path& input : options.inputs)
    result.documents += each_document(input, [&](const std::string& text) {
      std::vector<std::int32_t> tokens = tokenizer.encode(text);
      tokens.push_back(tokenizer.eos());
      if (!writer) {
        result.shards.push_back(shard_path(options, result.shards.size()));
        writer = std::make_unique<TokenShardWriter>(result.shards.back(), result.vocab);
      }
      writer->append(tokens);
      result.bytes += static_cast<std::int64_t>(text.size());
      result.tokens += static_cast<std::int64_t>(tokens.size());
      if (writer->size() >= options.shard_tokens) close();
    });
  close();
  // Shards of an earlier, longer run would silently join this one under the pattern PREFIX*.
  for (std::size_t i = result.shards.size(); fs::exists(shard_path(options, i)); ++i) {
    log_warning("{}: removed, left by an earlier run", shard_path(options, i).string());
    fs::remove(shard_path(options, i));
  }
  return result;
}

}  // namespace kiln

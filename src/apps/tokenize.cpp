#include <CLI/CLI.hpp>
#include <memory>

#include "apps/commands.h"
#include "base/log.h"
#include "base/text.h"
#include "io/tokenize.h"

namespace kiln {

void add_tokenize_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenize", "Train or load a tokenizer and write token shards");
  auto options = std::make_shared<TokenizeOptions>();
  command->add_option("--input", options->inputs, "text (.txt, documents parted by a form feed) or .jsonl files")
      ->required();
  command->add_option("--out", options->out, "directory of shards and tokenizer.model")->required();
  command->add_option("--train-vocab", options->train_vocab, "train a BPE tokenizer of this many pieces");
  command->add_option("--tokenizer", options->tokenizer, "use this SentencePiece model");
  command->add_option("--prefix", options->prefix, "name of the shards")->capture_default_str();
  command->add_option("--shard-tokens", options->shard_tokens, "tokens of one shard")->capture_default_str();
  add_quiet_flag(*command);
  command->footer("Example:\n  kiln tokenize --input data/corpus/train.txt --out data/shards --train-vocab 8192");
  command->callback([options] {
    const TokenizeResult result = tokenize_corpus(*options);
    log_info("{} documents, {} of text, {} tokens ({:.2f} bytes a token), vocabulary {}, {} shards in {}",
             result.documents, human_bytes(static_cast<std::uint64_t>(result.bytes)), result.tokens,
             static_cast<double>(result.bytes) / static_cast<double>(result.tokens), result.vocab, result.shards.size(),
             options->out.string());
  });
}

}  // namespace kiln

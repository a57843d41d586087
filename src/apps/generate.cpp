#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "apps/commands.h"
#include "base/log.h"
#include "core/parallel.h"
#include "io/tokenizer.h"
#include "train/device.h"
#include "train/generator.h"
#include "train/model_files.h"
#include "train/trainer.h"

namespace kiln {
namespace {

struct GenerateArguments {
  std::string checkpoint, prompt, tokenizer, prefill = "dense", device = "auto";
  std::int64_t tokens = 128;
  SamplingOptions sampling{.temperature = 0.8, .top_k = 0, .top_p = 0.95, .seed = 1};
};

/// Prints the text of a growing list of tokens as soon as its characters are complete.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void push(std::span<const std::int32_t> tokens) {
    pending_.insert(pending_.end(), tokens.begin(), tokens.end());
    const std::string text = tokenizer_.decode(pending_);
    // Byte pieces of an unfinished character decode as U+FFFD.
    if (!text.ends_with("\xEF\xBF\xBD")) print(text);
  }
  void finish() {
    print(tokenizer_.decode(pending_));
    std::putchar('\n');
    std::fflush(stdout);
  }

 private:
  /// What was printed last stays as context: SentencePiece drops the space before the first word that it decodes.
  void print(const std::string& text) {
    if (text.size() > context_bytes_)
      std::fwrite(text.data() + context_bytes_, 1, text.size() - context_bytes_, stdout);
    std::fflush(stdout);
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(context_tokens_));
    context_tokens_ = pending_.size();
    context_bytes_ = tokenizer_.decode(pending_).size();
  }

  const Tokenizer& tokenizer_;
  std::vector<std::int32_t> pending_;  // context, then tokens not yet printed
  std::size_t context_tokens_ = 0, context_bytes_ = 0;
};

Tokenizer open_tokenizer(const GenerateArguments& arguments, std::int64_t vocab) {
  std::filesystem::path path = arguments.tokenizer;
  if (path.empty()) {
    path = std::filesystem::path(arguments.checkpoint) / "tokenizer.model";
    if (!std::filesystem::is_regular_file(path))
      fail(ExitCode::data, "{}: missing; name the SentencePiece model of the training data with --tokenizer FILE",
           path.string());
  }
  Tokenizer tokenizer(path);
  if (tokenizer.vocab_size() > vocab)
    fail(ExitCode::data, "{}: {} pieces, expected at most the model's vocabulary of {}; use the tokenizer of its data",
         path.string(), tokenizer.vocab_size(), vocab);
  return tokenizer;
}

/// Whether the model was trained with BOS before its text: what the tokenizer's configuration says, if there is one.
bool starts_with_bos(const Tokenizer& tokenizer) {
  const std::filesystem::path path = tokenizer.path().parent_path() / "tokenizer_config.json";
  if (tokenizer.bos() < 0 || !std::filesystem::is_regular_file(path)) return false;
  const Json json = read_json(path);
  const auto found = json.find("add_bos_token");
  return found != json.end() && found->is_boolean() && found->get<bool>();
}

void run(const GenerateArguments& arguments) {
  check(arguments.prefill == "dense" || arguments.prefill == "flex", "--prefill '{}': expected dense",
        arguments.prefill);
  check(arguments.prefill == "dense", "--prefill flex: this version has dense prefill only; leave the option out");
  check(!arguments.prompt.empty(), "--prompt: empty; give the text to continue");
  validate(arguments.sampling);
  set_thread_count(rank_threads({}));
  const ModelWeights weights = load_model(arguments.checkpoint);
  const Tokenizer tokenizer = open_tokenizer(arguments, weights.config().vocab);
  TextStream stream(tokenizer);
  std::vector<std::int32_t> prompt = tokenizer.encode(arguments.prompt);
  stream.push(prompt);
  if (starts_with_bos(tokenizer)) prompt.insert(prompt.begin(), tokenizer.bos());
  const auto positions = static_cast<std::int64_t>(prompt.size()) + arguments.tokens;
  if (positions > weights.config().max_positions)
    log_warning("{} tokens exceed the {} positions that the model was made for; expect worse text", positions,
                weights.config().max_positions);
  const std::unique_ptr<Backend> backend = open_device(parse_device(arguments.device));
  const DeviceWeights on_device(weights, storage_layout(*backend), false, *backend);
  Generator generator(on_device, positions);
  generator.run(prompt, arguments.tokens, tokenizer.eos(), arguments.sampling, [&](std::int32_t token) {
    stream.push({&token, 1});
  });
  stream.finish();
}

}  // namespace

void add_generate_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continues a text, sampling with a KV cache");
  const auto arguments = std::make_shared<GenerateArguments>();
  SamplingOptions& sampling = arguments->sampling;
  command->add_option("CKPT", arguments->checkpoint, "Checkpoint, snapshot, merge or Hugging Face directory")
      ->required();
  command->add_option("--prompt", arguments->prompt, "Text to continue")->required();
  command->add_option("--tokens", arguments->tokens, "Tokens to add, at most")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--temperature", sampling.temperature, "0: the likeliest token")->capture_default_str();
  command->add_option("--top-k", sampling.top_k, "Only the K likeliest tokens; 0: all")->capture_default_str();
  command->add_option("--top-p", sampling.top_p, "Only the likeliest tokens that hold this probability")
      ->capture_default_str();
  command->add_option("--seed", sampling.seed, "The same seed gives the same text")->capture_default_str();
  command->add_option("--device", arguments->device, "auto, cpu or cuda")->capture_default_str();
  command->add_option("--prefill", arguments->prefill, "How the prompt is read: dense")->capture_default_str();
  command->add_option("--tokenizer", arguments->tokenizer, "SentencePiece model; else CKPT/tokenizer.model");
  command->footer("Example:\n  kiln generate runs/fira60m/step_00001000 --prompt 'It was a dark night' --seed 7");
  add_quiet_flag(*command);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace kiln

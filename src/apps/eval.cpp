#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "apps/commands.h"
#include "apps/failure.h"
#include "base/log.h"
#include "core/parallel.h"
#include "train/device.h"
#include "train/evaluator.h"
#include "train/model_files.h"
#include "train/trainer.h"

namespace kiln {
namespace {

struct EvalArguments {
  std::string checkpoint;
  std::vector<std::string> data;
  std::int64_t tokens = 0, seq_len = 256, micro = 8;
  std::uint64_t seed = 1;
  std::string device = "auto";
  bool json = false;
};

/// Mean loss over all sources, each by its share of the tokens asked for.
Evaluation evaluate(const EvalArguments& arguments, Communicator& communicator) {
  const ModelWeights weights = load_model(arguments.checkpoint);
  std::vector<Dataset> sets;
  std::int64_t samples = 0;
  for (const std::string& pattern : arguments.data) {
    sets.emplace_back(std::vector<DataSource>{{.pattern = pattern}}, arguments.seq_len, weights.config().vocab,
                      arguments.seed);
    samples += sets.back().samples_per_epoch();
  }
  const double share =
      arguments.tokens == 0
          ? 1.0
          : std::min(1.0, static_cast<double>(arguments.tokens) / static_cast<double>(samples * arguments.seq_len));
  const std::unique_ptr<Backend> backend = open_device(parse_device(arguments.device));
  const DeviceWeights on_device(weights, storage_layout(*backend), false, *backend);
  Evaluator evaluator(on_device, std::min(arguments.micro, samples), arguments.seq_len);
  Evaluation all;
  for (const Dataset& set : sets) {
    const double wanted = share * static_cast<double>(set.samples_per_epoch());
    const Evaluation one =
        evaluator.run(set, std::max<std::int64_t>(1, static_cast<std::int64_t>(std::llround(wanted))), communicator);
    all.loss += one.loss * static_cast<double>(one.tokens);
    all.tokens += one.tokens;
  }
  all.loss /= static_cast<double>(all.tokens);
  if (!std::isfinite(all.loss))
    fail(ExitCode::diverged, "{}: the loss is not finite; the weights are damaged or diverged, use an earlier one",
         arguments.checkpoint);
  return all;
}

void print(const EvalArguments& arguments, const Evaluation& evaluation) {
  if (arguments.json) {
    const Json json{{"checkpoint", arguments.checkpoint},
                    {"loss", evaluation.loss},
                    {"perplexity", evaluation.perplexity()},
                    {"tokens", evaluation.tokens},
                    {"seq_len", arguments.seq_len}};
    std::puts(json.dump(2).c_str());
  } else {
    fmt::print("{}: loss {:.6f}, perplexity {:.4f}, {} tokens\n", arguments.checkpoint, evaluation.loss,
               evaluation.perplexity(), evaluation.tokens);
  }
}

void run(const EvalArguments& arguments) {
  const auto communicator = make_communicator();
  set_thread_count(rank_threads({}));
  Evaluation evaluation;
  try {
    evaluation = evaluate(arguments, *communicator);
  } catch (const std::exception& e) {
    if (communicator->size() == 1) throw;
    abort_ranks(e, *communicator);
  }
  if (communicator->rank() == 0) print(arguments, evaluation);
}

}  // namespace

void add_eval_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Validation loss and perplexity; the same under mpirun -n N");
  const auto arguments = std::make_shared<EvalArguments>();
  command->add_option("CKPT", arguments->checkpoint, "Checkpoint, snapshot, merge or Hugging Face directory")
      ->required();
  command->add_option("--data", arguments->data, "Token shards: files, or patterns in quotes")->required();
  command->add_option("--tokens", arguments->tokens, "Tokens to evaluate, spread over the data; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--seq-len", arguments->seq_len, "Tokens of a sample")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--micro", arguments->micro, "Sequences of one pass")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--device", arguments->device, "auto, cpu (f32) or cuda (bf16, sums in f32)")
      ->capture_default_str();
  command->add_option("--seed", arguments->seed, "Which samples, when --tokens is less than all")
      ->capture_default_str();
  command->add_flag("--json", arguments->json, "Print one JSON object");
  command->footer("Example:\n  kiln eval runs/fira60m/step_00001000 --data 'data/shards/valid*' --json");
  add_quiet_flag(*command);
  command->callback([arguments] { run(*arguments); });
}

}  // namespace kiln

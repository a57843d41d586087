#include <CLI/CLI.hpp>
#include <memory>

#include "apps/commands.h"
#include "base/log.h"
#include "base/text.h"
#include "train/model_convert.h"

namespace kiln {
namespace {

struct ConvertArguments {
  std::string from, out, dtype = "fp32";
};

/// Import and export differ in what their users have in hand, not in what they do.
void add_convert_command(CLI::App& app, const char* name, const char* description, const char* from,
                         const char* from_help, const char* footer) {
  CLI::App* command = app.add_subcommand(name, description);
  const auto arguments = std::make_shared<ConvertArguments>();
  command->add_option(from, arguments->from, from_help)->required();
  command->add_option("--out", arguments->out, "Directory to write; it must not exist yet")->required();
  command->add_option("--dtype", arguments->dtype, "Weights as fp32 or bf16 (rounded to nearest)")
      ->capture_default_str();
  command->footer(footer);
  add_quiet_flag(*command);
  command->callback([arguments] {
    const ConvertedModel model =
        convert_model(arguments->from, arguments->out, parse_weight_dtype(arguments->dtype, "--dtype"));
    log_info("wrote {}: {} parameters, {}; {}", arguments->out, human_count(static_cast<double>(model.parameters)),
             arguments->dtype,
             model.tokenizer_files.empty() ? "no tokenizer found"
                                           : fmt::format("with {}", fmt::join(model.tokenizer_files, ", ")));
  });
}

}  // namespace

void add_import_command(CLI::App& app) {
  add_convert_command(app, "import", "Reads a Hugging Face LLaMA directory and writes a kiln checkpoint", "DIR",
                      "Directory with config.json and model.safetensors or its shards",
                      "Example:\n  kiln import ~/models/llama-160m --out models/llama-160m\n"
                      "  kiln train config.yaml --init-from models/llama-160m");
}

void add_export_command(CLI::App& app) {
  add_convert_command(app, "export", "Writes the model of a checkpoint alone, as `transformers` reads it", "CKPT",
                      "Checkpoint, snapshot or merge",
                      "Example:\n  kiln export runs/fira60m/step_00001000 --out hf --dtype bf16");
}

}  // namespace kiln

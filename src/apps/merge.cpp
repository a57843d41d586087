#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <sstream>

#include "apps/commands.h"
#include "base/error.h"
#include "merge/merge_request.h"

namespace kiln {
namespace {

/// What was given for each key of merge_keys(), as CLI11 fills it in. Empty: not given.
struct MergeArguments {
  std::vector<std::string> checkpoints;
  std::map<std::string, std::string> values;
  std::map<std::string, bool> flags;
  bool json = false;
};

std::string option_name(const MergeKey& key) {
  std::string name(key.name);
  std::replace(name.begin(), name.end(), '_', '-');
  return (key.kind == MergeKeyKind::no_flag ? "--no-" : "--") + name;
}

void add_key(CLI::App& command, const MergeKey& key, MergeArguments& arguments) {
  const std::string name(key.name), help(key.help);
  switch (key.kind) {
    case MergeKeyKind::positional:
      command.add_option(name, arguments.checkpoints, help + ", or MERGE.yaml");
      return;
    case MergeKeyKind::value:
    case MergeKeyKind::list:
      command.add_option(option_name(key), arguments.values[name], help);
      return;
    case MergeKeyKind::flag:
      command.add_flag(option_name(key), arguments.flags[name], help);
      return;
    case MergeKeyKind::no_flag:
      command.add_flag(option_name(key), arguments.flags[name], "do not " + help);
      return;
  }
}

/// A list is one word, "0.1,0.2": a list of CLI11's would swallow the checkpoints that follow.
std::vector<std::string> split_list(const std::string& word) {
  std::vector<std::string> words;
  std::istringstream in(word);
  for (std::string item; std::getline(in, item, ',');) words.push_back(item);
  return words;
}

/// MERGE.yaml first, where one is given; options of the command line then have the last word.
MergeRequest to_request(const MergeArguments& arguments) {
  MergeRequest request;
  const std::vector<std::string>& paths = arguments.checkpoints;
  const bool from_file = paths.size() == 1 && (paths[0].ends_with(".yaml") || paths[0].ends_with(".yml"));
  if (from_file)
    request = read_merge_file(paths[0]);
  else
    request.checkpoints = paths;
  for (const MergeKey& key : merge_keys()) {
    const std::string name(key.name);
    if (const auto value = arguments.values.find(name); value != arguments.values.end() && !value->second.empty()) {
      const bool list = key.kind == MergeKeyKind::list;
      set_merge_key(request, key.name, list ? split_list(value->second) : std::vector<std::string>{value->second},
                    option_name(key));
    }
    if (const auto flag = arguments.flags.find(name); flag != arguments.flags.end() && flag->second)
      set_merge_key(request, key.name, {key.kind == MergeKeyKind::flag ? "true" : "false"}, option_name(key));
  }
  return request;
}

}  // namespace

void add_merge_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("merge", "average checkpoints into one");
  const auto arguments = std::make_shared<MergeArguments>();
  for (const MergeKey& key : merge_keys()) add_key(*command, key, *arguments);
  command->add_flag("--json", arguments->json, "print the report as JSON");
  add_quiet_flag(*command);
  command->footer(
      "Example: kiln merge runs/fira60m --method ema --alpha 0.1 --last 10 --out merged\n"
      "         kiln merge runs/fira60m --last 10 --out merged --dry-run\n"
      "A run's directory stands for its snapshots (RUN/snapshots) or, without any, its checkpoints.");
  command->callback([arguments, command] {
    const MergeReport report = merge_checkpoints(resolve_merge(to_request(*arguments)));
    if (arguments->json)
      std::puts(to_json(report).dump(2).c_str());
    else if (command->count("--quiet") == 0)
      std::fputs(merge_table(report).c_str(), stdout);
  });
}

}  // namespace kiln

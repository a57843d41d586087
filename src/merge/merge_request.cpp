#include "merge/merge_request.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/text.h"
#include "merge/inputs.h"

namespace kiln {
namespace {

using Words = std::vector<std::string>;
using Setter = void (*)(MergeRequest&, const Words&);

const std::string& one(const Words& words) {
  check(words.size() == 1, "found {} values, expected one", words.size());
  return words.front();
}

template <typename Number>
Number to_number(const std::string& word, std::string_view expected) {
  Number value{};
  const char* end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, value);
  check(error == std::errc{} && stop == end, "found '{}', expected {}", word, expected);
  return value;
}

double to_double(const Words& words) { return to_number<double>(one(words), "a number"); }
std::size_t to_count(const Words& words) { return to_number<std::size_t>(one(words), "a whole number"); }

std::vector<double> to_doubles(const Words& words) {
  std::vector<double> values;
  for (const std::string& word : words) values.push_back(to_number<double>(word, "a list of numbers"));
  return values;
}

bool to_bool(const Words& words) {
  const std::string& word = one(words);
  check(word == "true" || word == "false", "found '{}', expected true or false", word);
  return word == "true";
}

struct KeyRow {
  MergeKey key;
  Setter set;
};

const std::array<KeyRow, 17> kKeys{{
    {{"checkpoints", MergeKeyKind::positional, "checkpoint directories, or a run's directory of snapshots"},
     [](MergeRequest& r, const Words& w) { r.checkpoints = w; }},
    {{"method", MergeKeyKind::value, "sma, wma, ema, ema-closed, schedule, qam or custom (default sma)"},
     [](MergeRequest& r, const Words& w) { r.options.weights.method = parse_merge_method(one(w)); }},
    {{"out", MergeKeyKind::value, "directory of the merged checkpoint"},
     [](MergeRequest& r, const Words& w) { r.options.output = one(w); }},
    {{"alpha", MergeKeyKind::value, "weight of the newest, for ema and ema-closed (default 0.1)"},
     [](MergeRequest& r, const Words& w) { r.options.weights.alpha = to_double(w); }},
    {{"shape", MergeKeyKind::value, "decay to replay, for schedule and qam: linear, cosine or 1-sqrt (default linear)"},
     [](MergeRequest& r, const Words& w) { r.options.weights.shape = parse_decay_shape(one(w)); }},
    {{"final_ratio", MergeKeyKind::value, "where the decay ends, for schedule and qam (default 0)"},
     [](MergeRequest& r, const Words& w) { r.options.weights.final_ratio = to_double(w); }},
    {{"decay", MergeKeyKind::list, "decay factors of the N-1 updates, instead of a shape"},
     [](MergeRequest& r, const Words& w) { r.options.weights.decay = to_doubles(w); }},
    {{"weights", MergeKeyKind::list, "weights, oldest first: method custom"},
     [](MergeRequest& r, const Words& w) { r.options.weights.custom = to_doubles(w); }},
    {{"normalise", MergeKeyKind::no_flag, "divide the weights of ema-closed and custom by their sum"},
     [](MergeRequest& r, const Words& w) { r.options.weights.normalise = to_bool(w); }},
    {{"last", MergeKeyKind::value, "the newest N checkpoints only"},
     [](MergeRequest& r, const Words& w) { r.last = to_count(w); }},
    {{"every", MergeKeyKind::value, "every K-th checkpoint, counted back from the newest"},
     [](MergeRequest& r, const Words& w) { r.every = to_count(w); }},
    {{"dtype", MergeKeyKind::value,
      "of the merged weights: fp32, bf16, fp16, or same as in the newest checkpoint (default fp32)"},
     [](MergeRequest& r, const Words& w) { r.options.dtype = parse_merge_dtype(one(w)); }},
    {{"optimizer_state", MergeKeyKind::value, "reset, keep-last or average (default reset)"},
     [](MergeRequest& r, const Words& w) { r.options.optimizer_state = parse_optimizer_state_merge(one(w)); }},
    {{"max_shard_size", MergeKeyKind::value,
      "most bytes of a model file, such as 2GiB: shards and an index instead of model.safetensors"},
     [](MergeRequest& r, const Words& w) {
       r.options.max_shard_bytes = parse_bytes(one(w), "the largest shard");
       check(r.options.max_shard_bytes > 0, "found '{}', expected 1 byte or more", one(w));
     }},
    {{"verify", MergeKeyKind::no_flag, "check the manifests' hashes"},
     [](MergeRequest& r, const Words& w) { r.options.verify = to_bool(w); }},
    {{"keep_order", MergeKeyKind::flag, "take the order given as oldest first, whatever the steps say"},
     [](MergeRequest& r, const Words& w) { r.options.keep_order = to_bool(w); }},
    {{"dry_run", MergeKeyKind::flag, "verify the inputs, print weights and what would be written, and write nothing"},
     [](MergeRequest& r, const Words& w) { r.options.dry_run = to_bool(w); }},
}};

Words words_of(const YAML::Node& node, std::string_view where) {
  Words words;
  if (node.IsScalar()) words.push_back(node.Scalar());
  if (node.IsSequence())
    for (const YAML::Node& item : node) {
      check(item.IsScalar(), "{}: found a nested list, expected plain values", where);
      words.push_back(item.Scalar());
    }
  check(!words.empty(), "{}: found no value, expected a scalar or a list", where);
  return words;
}

std::string place(const std::filesystem::path& path, const YAML::Mark& mark) {
  return fmt::format("{}:{}:{}", path.string(), mark.line + 1, mark.column + 1);
}

YAML::Node load_yaml(const std::filesystem::path& path) {
  try {
    return YAML::Load(read_text(path));
  } catch (const YAML::Exception& e) {
    fail(ExitCode::usage, "{}: {}; correct the YAML", place(path, e.mark), e.msg);
  }
}

WeightOptions resolve_weights(WeightOptions weights) {
  if (!weights.custom.empty()) {
    check(weights.method == MergeMethod::custom || weights.method == MergeMethod::sma,
          "weights are given beside method {}; leave one of them out", to_string(weights.method));
    weights.method = MergeMethod::custom;
  }
  check(weights.decay.empty() || weights.method == MergeMethod::schedule || weights.method == MergeMethod::qam,
        "decay factors are given for method {}; use method schedule or qam", to_string(weights.method));
  return weights;
}

/// A key that the method would pass over.
void check_read(const MergeRequest& request, MergeMethod method) {
  using enum MergeMethod;
  struct Reader {
    std::string_view key;
    std::array<MergeMethod, 2> methods;
  };
  constexpr std::array<Reader, 4> kReaders{{{"alpha", {ema, ema_closed}},
                                            {"shape", {schedule, qam}},
                                            {"final_ratio", {schedule, qam}},
                                            {"normalise", {ema_closed, custom}}}};
  for (const Reader& reader : kReaders)
    check(!request.given.contains(reader.key) || std::ranges::find(reader.methods, method) != reader.methods.end(),
          "{} is given, which method {} does not read; use method {} or {}, or leave it out", reader.key,
          to_string(method), to_string(reader.methods[0]), to_string(reader.methods[1]));
}

}  // namespace

std::span<const MergeKey> merge_keys() {
  static const auto keys = [] {
    std::array<MergeKey, kKeys.size()> all{};
    std::transform(kKeys.begin(), kKeys.end(), all.begin(), [](const KeyRow& row) { return row.key; });
    return all;
  }();
  return keys;
}

void set_merge_key(MergeRequest& request, std::string_view key, const Words& words, std::string_view where) {
  const auto* row = std::find_if(kKeys.begin(), kKeys.end(), [&](const KeyRow& r) { return r.key.name == key; });
  if (row == kKeys.end()) {
    std::array<std::string_view, kKeys.size()> names;
    std::transform(kKeys.begin(), kKeys.end(), names.begin(), [](const KeyRow& r) { return r.key.name; });
    fail(ExitCode::usage, "{}: unknown key '{}'; the nearest is '{}'", where, key, nearest(key, names));
  }
  try {
    row->set(request, words);
    request.given.emplace(key);
  } catch (const Error& e) {
    fail(e.code(), "{}: {}: {}", where, key, e.what());
  }
}

MergeRequest read_merge_file(const std::filesystem::path& path) {
  const YAML::Node root = load_yaml(path);
  check(root.IsMap(), "{}: found no keys, expected a map with checkpoints, method and out", place(path, root.Mark()));
  MergeRequest request;
  std::set<std::string> seen;
  for (const auto& item : root) {
    const std::string where = place(path, item.first.Mark());
    check(item.first.IsScalar(), "{}: found a key that is a list or map, expected a word", where);
    const std::string key = item.first.Scalar();
    check(seen.insert(key).second, "{}: key '{}' stands here a second time; keep one of them", where, key);
    set_merge_key(request, key, words_of(item.second, where), where);
  }
  return request;
}

MergeOptions resolve_merge(const MergeRequest& request) {
  MergeOptions options = request.options;
  options.weights = resolve_weights(options.weights);
  check_read(request, options.weights.method);
  check(!request.checkpoints.empty(), "no checkpoint to merge; give at least one");
  std::vector<std::filesystem::path> paths;
  for (const std::string& pattern : request.checkpoints)
    for (const std::filesystem::path& path : expand_glob(pattern)) paths.push_back(path);
  const auto ordered = order_checkpoints(expand_checkpoints(paths), order_policy(options));
  options.keep_order = true;  // it is settled here, with at most one warning
  options.inputs = select_checkpoints(ordered, request.last, request.every);
  check(request.last == 0 || options.inputs.size() == request.last,
        "last: {} checkpoints are asked for, but {} of {} are there; give {} or fewer", request.last,
        request.every > 1 ? fmt::format("every {}-th", request.every) : "all", ordered.size(), options.inputs.size());
  return options;
}

}  // namespace kiln

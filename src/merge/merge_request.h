#pragma once
#include <filesystem>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "merge/streaming_merge.h"

namespace kiln {

/// What `kiln merge` was asked for, on the command line or in a YAML file.
struct MergeRequest {
  std::vector<std::string> checkpoints;  // checkpoint directories, run directories, or patterns of either
  std::size_t last = 0;                  // the newest N of them; 0: all
  std::size_t every = 1;                 // every K-th, counted back from the newest
  MergeOptions options;
  std::set<std::string, std::less<>> given;  // keys that were set
};

/// How a key is written on the command line: `--key VALUE`, or a flag that sets it.
enum class MergeKeyKind { positional, value, list, flag, no_flag };

/// One key of MERGE.yaml, and option of the command line (`keep_order` is `--keep-order`; a `no_flag` such as
/// `verify` is `--no-verify` there).
struct MergeKey {
  std::string_view name;
  MergeKeyKind kind;
  std::string_view help;
};

/// Every key there is.
std::span<const MergeKey> merge_keys();

/// Sets one key from its words. A usage Error starts with `where` (`merge.yaml:3:1` or `--alpha`).
void set_merge_key(MergeRequest& request, std::string_view key, const std::vector<std::string>& words,
                   std::string_view where);

/// Reads MERGE.yaml. A usage Error gives file:line:column, and for an unknown key the nearest.
MergeRequest read_merge_file(const std::filesystem::path& path);

/// Settles what depends on several keys (lists of weights choose `custom`, patterns and run directories become
/// checkpoints, oldest first, `every` and `last` select), and fills `options.inputs`.
/// A usage Error for keys that contradict, or that the method does not read; a data Error for a path that holds no
/// checkpoint.
MergeOptions resolve_merge(const MergeRequest& request);

}  // namespace kiln

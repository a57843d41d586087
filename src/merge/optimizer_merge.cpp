#include "merge/optimizer_merge.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "merge/write_averages.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

struct Named {
  OptimizerStateMerge merge;
  std::string_view name;
};
constexpr std::array<Named, 3> kMerges{{{OptimizerStateMerge::reset, "reset"},
                                        {OptimizerStateMerge::keep_last, "keep-last"},
                                        {OptimizerStateMerge::average, "average"}}};

/// Sorted names of a checkpoint's optimizer files.
std::vector<std::string> optimizer_names(const MergeInput& input) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(input.directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("optimizer-") && name.ends_with(".safetensors")) names.push_back(name);
  }
  if (names.empty())
    fail(ExitCode::data,
         "{}: holds no optimizer state (snapshots never do); merge a run's step_* checkpoints, or use "
         "--optimizer-state reset",
         input.directory.string());
  std::sort(names.begin(), names.end());
  return names;
}

bool is_floating(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16 || dtype == DType::f16;
}

/// The limiter of a matrix whose moments lie in a random basis, drawn anew at every refresh.
bool has_random_basis(const SafetensorsReader& file, const SafetensorEntry& entry) {
  constexpr std::string_view kLimiter = ".limiter_norm";
  if (!entry.name.ends_with(kLimiter)) return false;
  return file.find(entry.name.substr(0, entry.name.size() - kLimiter.size()) + ".projector") == nullptr;
}

void check_averageable(const SafetensorsReader& file, const SafetensorEntry& entry) {
  if (!is_floating(entry.dtype))
    fail(ExitCode::data, "{}: optimizer state '{}' is {} and cannot be averaged; use --optimizer-state keep-last",
         file.path().string(), entry.name, to_string(entry.dtype));
  if (has_random_basis(file, entry))
    fail(ExitCode::data,
         "{}: '{}' belongs to moments in a random basis, which changes between checkpoints, and they cannot be "
         "averaged; "
         "use --optimizer-state keep-last",
         file.path().string(), entry.name);
}

void check_same_states(const SafetensorsReader& first, const SafetensorsReader& other) {
  if (first.entries().size() != other.entries().size())
    fail(ExitCode::data, "{}: holds {} optimizer states, expected {} as in {}; merge checkpoints of one run",
         other.path().string(), other.entries().size(), first.entries().size(), first.path().string());
  for (const SafetensorEntry& entry : first.entries()) {
    const SafetensorEntry* same = other.find(entry.name);
    if (same == nullptr || same->shape != entry.shape || same->dtype != entry.dtype)
      fail(ExitCode::data, "{}: optimizer state '{}' {}; merge checkpoints of one run", other.path().string(),
           entry.name, same == nullptr ? "is missing" : "has another shape or dtype than in " + first.path().string());
    const auto a = first.bytes(entry), b = other.bytes(*same);
    if (entry.name.ends_with(".projector") && !std::equal(a.begin(), a.end(), b.begin()))
      fail(
          ExitCode::data,
          "{}: '{}' differs from that of {}: it was refreshed in between, and moments in two bases cannot be averaged; "
          "use --optimizer-state keep-last",
          other.path().string(), entry.name, first.path().string());
    if (entry.name.ends_with(".lora_a") && !std::equal(a.begin(), a.end(), b.begin()))
      fail(
          ExitCode::data,
          "{}: '{}' differs from that of {}, and the product of averaged factors is not the average of their products; "
          "use --optimizer-state keep-last",
          other.path().string(), entry.name, first.path().string());
  }
}

OptimizerFiles::File open_for_average(const std::vector<MergeInput>& inputs, const std::string& name) {
  OptimizerFiles::File file{name, {}, {}};
  for (const MergeInput& input : inputs) {
    if (!fs::exists(input.directory / name))
      fail(ExitCode::data, "{}: lacks {}; merge checkpoints of one run, or use --optimizer-state keep-last",
           input.directory.string(), name);
    file.inputs.push_back(std::make_unique<SafetensorsReader>(input.directory / name));
    check_same_states(*file.inputs.front(), *file.inputs.back());
  }
  for (const SafetensorEntry& entry : file.inputs.front()->entries()) check_averageable(*file.inputs.front(), entry);
  return file;
}

void write_average(const fs::path& path, const OptimizerFiles::File& file, std::span<const double> weights,
                   std::size_t piece_elements) {
  std::vector<SafetensorsWriter::Item> items;
  std::map<std::string, Sources> sources;
  for (const SafetensorEntry& entry : file.inputs.front()->entries()) {
    items.push_back({entry.name, entry.dtype, entry.shape});
    for (const auto& input : file.inputs) sources[entry.name].push_back({input.get(), input->find(entry.name)});
  }
  SafetensorsWriter writer(path, items);
  FileSink sink(writer);
  write_averages(sink, sources, weights, piece_elements, nullptr);
  writer.finish();
}

}  // namespace

std::string_view to_string(OptimizerStateMerge merge) {
  return std::find_if(kMerges.begin(), kMerges.end(), [&](const Named& n) { return n.merge == merge; })->name;
}

OptimizerStateMerge parse_optimizer_state_merge(std::string_view name) {
  const auto* found = std::find_if(kMerges.begin(), kMerges.end(), [&](const Named& n) { return n.name == name; });
  check(found != kMerges.end(), "optimizer state '{}' does not exist; use one of reset, keep-last, average", name);
  return found->merge;
}

bool lack_a_mean(const SafetensorsReader& states) {
  return std::ranges::any_of(states.entries(), [&](const SafetensorEntry& state) {
    return state.name.ends_with(".projector") || state.name.ends_with(".lora_a") || !is_floating(state.dtype) ||
           has_random_basis(states, state);
  });
}

OptimizerFiles open_optimizer_files(const std::vector<MergeInput>& inputs, const MergeInput& newest,
                                    std::span<const double> weights, OptimizerStateMerge merge) {
  OptimizerFiles all;
  if (merge == OptimizerStateMerge::reset) return all;
  for (const std::string& name : optimizer_names(newest))
    all.files.push_back(merge == OptimizerStateMerge::keep_last
                            ? OptimizerFiles::File{name, newest.directory / name, {}}
                            : open_for_average(inputs, name));
  check(merge == OptimizerStateMerge::keep_last ||
            std::all_of(weights.begin(), weights.end(), [](double weight) { return weight >= 0.0; }),
        "a weight is negative, and would make averaged second moments negative; use --optimizer-state keep-last");
  return all;
}

void write_optimizer_files(CheckpointWriter& writer, const OptimizerFiles& files, std::span<const double> weights,
                           std::size_t piece_elements) {
  for (const OptimizerFiles::File& file : files.files) {
    if (file.inputs.empty())
      writer.copy_file(file.source, file.name);
    else
      write_average(writer.directory() / file.name, file, weights, piece_elements);
  }
}

}  // namespace kiln

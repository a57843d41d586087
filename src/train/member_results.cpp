#include "train/member_results.h"

#include <algorithm>
#include <cmath>

namespace kiln {
namespace {

using enum OptimizerKind;

// Perplexity on C4 after the steps that the papers give each size, ranks of 128, 256, 256 and 512 (GaLore at 1B: 1024).
constexpr std::string_view kFira = "Fira, arXiv:2410.01623, and APOLLO, arXiv:2412.05270",
                           kScale = "re-runs of arXiv:2506.16659";
constexpr MemberResult kFira60m[] = {{adamw, 34.06}, {galore, 34.88}, {lora, 34.99},       {relora, 37.04},
                                     {fira, 31.06},  {apollo, 31.55}, {apollo_mini, 31.93}};
constexpr MemberResult kFira130m[] = {{adamw, 25.08}, {galore, 25.36}, {lora, 33.92},       {relora, 29.37},
                                      {fira, 22.73},  {apollo, 22.94}, {apollo_mini, 23.53}};
constexpr MemberResult kFira350m[] = {{adamw, 18.80}, {galore, 18.95}, {lora, 25.58},       {relora, 29.08},
                                      {fira, 16.85},  {apollo, 16.85}, {apollo_mini, 17.18}};
constexpr MemberResult kFira1b[] = {{adamw, 15.56}, {galore, 15.64}, {lora, 19.21},       {relora, 18.33},
                                    {fira, 14.31},  {apollo, 14.20}, {apollo_mini, 14.17}};
constexpr MemberResult kScale60m[] = {{adamw, 30.05},  {galore, 34.58},      {fira, 30.34},
                                      {apollo, 30.94}, {apollo_mini, 31.85}, {muon, 28.86}};
constexpr MemberResult kScale130m[] = {{adamw, 23.13},  {galore, 25.31},      {fira, 22.96},
                                       {apollo, 22.93}, {apollo_mini, 23.63}, {muon, 22.20}};
constexpr MemberResult kScale350m[] = {{adamw, 18.77},  {galore, 19.37},      {fira, 16.82},
                                       {apollo, 16.75}, {apollo_mini, 17.11}, {muon, 16.70}};
constexpr MemberResult kScale1b[] = {{adamw, 16.52},  {galore, 15.57},      {fira, 15.10},
                                     {apollo, 14.20}, {apollo_mini, 14.13}, {muon, 14.18}};
// 197M tokens, learning rates from a grid; ranks of 128, fira+ of 384 with bf16 moments.
constexpr std::string_view kOwn = "kiln's own runs, scripts/results/gpu_optimizers.md";
constexpr MemberResult kOwn60m[] = {{adamw, 41.30},     {adam8bit, 41.52}, {galore, 44.74},      {fira, 42.46},
                                    {fira_plus, 40.37}, {apollo, 46.29},   {apollo_mini, 50.99}, {muon, 37.75},
                                    {lora, 60.56},      {relora, 57.16}};

const MemberTable kTables[] = {{"60M", kFira, 58'073'600, kFira60m},      {"130M", kFira, 134'105'856, kFira130m},
                               {"350M", kFira, 367'969'280, kFira350m},   {"1B", kFira, 1'339'082'752, kFira1b},
                               {"60M", kScale, 58'073'600, kScale60m},    {"130M", kScale, 134'105'856, kScale130m},
                               {"350M", kScale, 367'969'280, kScale350m}, {"1B", kScale, 1'339'082'752, kScale1b},
                               {"60M", kOwn, 58'073'600, kOwn60m}};

}  // namespace

std::vector<MemberTable> nearest_results(std::int64_t parameters) {
  const auto distance = [&](const MemberTable& table) {
    return std::abs(std::log(static_cast<double>(table.parameters) / static_cast<double>(parameters)));
  };
  std::vector<MemberTable> nearest;
  for (const std::string_view source : {kFira, kScale, kOwn}) {
    const MemberTable* best = nullptr;
    for (const MemberTable& table : kTables)
      if (table.source == source && (best == nullptr || distance(table) < distance(*best))) best = &table;
    nearest.push_back(*best);
  }
  return nearest;
}

std::vector<MemberResult> ranked(const MemberTable& table, std::span<const OptimizerKind> candidates) {
  std::vector<MemberResult> list;
  for (const MemberResult& result : table.results)
    if (std::ranges::find(candidates, result.kind) != candidates.end()) list.push_back(result);
  std::ranges::stable_sort(list, {}, &MemberResult::perplexity);
  return list;
}

}  // namespace kiln

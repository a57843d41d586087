#include "merge/anneal_check.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/files.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

AnnealCheck parse_check(const fs::path& path) {
  const Json json = read_json(path);
  try {
    AnnealCheck check{.anneal = {.begin = json.at("begin"),
                                 .end = json.at("end"),
                                 .shape = parse_decay_shape(json.at("shape").get<std::string>()),
                                 .final_ratio = json.at("final_ratio")},
                      .last_loss = json.at("last_loss"),
                      .annealed_loss = json.at("annealed_loss"),
                      .errors = {}};
    for (const auto& [name, error] : json.at("errors").items()) check.errors[name] = error.get<double>();
    return check;
  } catch (const nlohmann::json::exception& e) {
    fail(ExitCode::data, "{}: is no record of an anneal check ({}); remove it, and check again", path.string(),
         e.what());
  }
}

}  // namespace

bool same_kind(const Anneal& a, const Anneal& b) {
  constexpr double kMost = 1.25;
  return a.shape == b.shape && a.final_ratio == b.final_ratio && a.share() <= kMost * b.share() &&
         b.share() <= kMost * a.share();
}

double anneal_factor(const Anneal& anneal, std::int64_t step) {
  if (step <= anneal.begin) return 1.0;
  const double x = std::min(1.0, static_cast<double>(step - anneal.begin) / static_cast<double>(anneal.steps()));
  return anneal.final_ratio + (1.0 - anneal.final_ratio) * decay_at(anneal.shape, x);
}

std::string anneal_name(const Anneal& anneal) {
  return fmt::format("{}_{}_{:08}_{:08}", to_string(anneal.shape), anneal.final_ratio, anneal.begin, anneal.end);
}

void write_check(const fs::path& anneal_dir, const AnnealCheck& check) {
  Json json = {{"begin", check.anneal.begin},
               {"end", check.anneal.end},
               {"shape", to_string(check.anneal.shape)},
               {"final_ratio", check.anneal.final_ratio},
               {"last_loss", check.last_loss},
               {"annealed_loss", check.annealed_loss},
               {"errors", Json::object()}};
  for (const auto& [name, error] : check.errors) json["errors"][name] = error;
  write_text_atomic(anneal_dir / "check.json", json.dump(2) + "\n");
}

std::vector<AnnealCheck> read_checks(const fs::path& run_dir) {
  std::vector<AnnealCheck> checks;
  if (!fs::is_directory(run_dir / "anneals")) return checks;
  for (const fs::directory_entry& entry : fs::directory_iterator(run_dir / "anneals"))
    if (fs::exists(entry.path() / "check.json")) checks.push_back(parse_check(entry.path() / "check.json"));
  std::stable_sort(checks.begin(), checks.end(), [](const AnnealCheck& a, const AnnealCheck& b) {
    return std::pair(a.anneal.end, anneal_name(a.anneal)) < std::pair(b.anneal.end, anneal_name(b.anneal));
  });
  return checks;
}

}  // namespace kiln

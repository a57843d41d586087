#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/decay_shape.h"
#include "base/json.h"

namespace kiln {

/// The anneal that a prediction is about: steps `begin` + 1 to `end` of a constant-rate run, with a falling rate.
struct Anneal {
  std::int64_t begin = 0, end = 0;
  DecayShape shape = DecayShape::linear;
  double final_ratio = 0;
  std::int64_t steps() const { return end - begin; }
  double share() const {
    return static_cast<double>(steps()) / static_cast<double>(end);
  }  ///< of all steps up to its end
};

/// Whether the errors and the gap of one say something about the other: the same shape and final ratio, and shares that
/// differ by a quarter at most, since anneals begin where there is a checkpoint.
bool same_kind(const Anneal& a, const Anneal& b);

/// The learning rate's factor at a step: 1 up to `begin`, `final_ratio` at `end`.
double anneal_factor(const Anneal& anneal, std::int64_t step);

/// "linear_0.1_00000900_00001000": the directory of its run, below RUN/anneals.
std::string anneal_name(const Anneal& anneal);

/// What a real anneal showed about every predictor. Kept as check.json in the anneal's directory.
struct AnnealCheck {
  Anneal anneal;
  double last_loss = 0, annealed_loss = 0;  // held-out, nats
  std::map<std::string, double> errors;     // predicted minus annealed, by predictor
};

void write_check(const std::filesystem::path& anneal_dir, const AnnealCheck& check);
/// The checks below RUN/anneals, by end; none where there is no such directory. A data Error for a damaged one.
std::vector<AnnealCheck> read_checks(const std::filesystem::path& run_dir);

}  // namespace kiln

#pragma once
#include <string>
#include <vector>

#include "report/run_data.h"

namespace kiln {

/// The part of a report about runs that `kiln predict` was asked about: for each its prediction in a sentence, the
/// validation loss of trunk, anneals and merges against tokens, and the sweep over (N, V). Empty when there is none.
/// A data Error for a prediction.json that kiln did not write.
std::string prediction_section(const std::vector<RunData>& runs);

}  // namespace kiln

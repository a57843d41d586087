#pragma once
#include <string>

#include "base/json.h"
#include "merge/prediction.h"

namespace kiln {

/// Everything, as `kiln predict --json` prints it and RUN/prediction.json keeps it for reports.
Json to_json(const Prediction& prediction);

/// What `kiln predict` prints: the anneal, a row for each predictor, the sweep over (N, V) as differences to the last
/// snapshot, and the prediction with its interval and reason. Ends with a newline.
std::string prediction_text(const std::string& run, const Prediction& prediction);

}  // namespace kiln

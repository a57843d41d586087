#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>

namespace kiln {

/// Keys keep the order in which they were written.
using Json = nlohmann::ordered_json;

/// Parses a file; a data Error names the file, line and column of a fault.
Json read_json(const std::filesystem::path& path);

}  // namespace kiln

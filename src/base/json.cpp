#include "base/json.h"

#include "base/error.h"
#include "base/files.h"

namespace kiln {

Json read_json(const std::filesystem::path& path) {
  const std::string text = read_text(path);
  try {
    return Json::parse(text);
  } catch (const nlohmann::json::exception& e) {
    fail(ExitCode::data, "{}: not valid JSON ({}); write the file again", path.string(), e.what());
  }
}

}  // namespace kiln

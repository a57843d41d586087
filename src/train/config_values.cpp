#include "train/config_values.h"

#include "base/text.h"

namespace kiln::config_values {

std::string Place::at(const YAML::Node& node) const {
  if (!has_line || node.Mark().is_null()) return fmt::format("{}: {}", file, key);
  return fmt::format("{}:{}:{}: {}", file, node.Mark().line + 1, node.Mark().column + 1, key);
}

void bad_value(const Place& place, const YAML::Node& node, std::string_view expected) {
  const std::string found = node.IsScalar() ? fmt::format("'{}'", node.Scalar())
                            : node.IsMap()  ? "a map"
                            : node.IsNull() ? "nothing"
                                            : "a list";
  fail(ExitCode::usage, "{} is {}, expected {}", place.at(node), found, expected);
}

namespace {

template <typename T>
void read_scalar(const YAML::Node& node, const Place& place, T& out, std::string_view expected) {
  if (!node.IsScalar() || !YAML::convert<T>::decode(node, out)) bad_value(place, node, expected);
}

DataSource read_source(const YAML::Node& node, const Place& place) {
  DataSource source;
  if (node.IsScalar()) {
    read(node, place, source.pattern);
    return source;
  }
  if (!node.IsMap()) bad_value(place, node, "a path, or {path: ..., weight: ...}");
  for (const auto& item : node) {
    const auto name = item.first.as<std::string>();
    if (name == "path")
      read(item.second, place, source.pattern);
    else if (name == "weight")
      read(item.second, place, source.weight);
    else
      fail(ExitCode::usage, "{}: key '{}' is not known; expected path or weight", place.at(item.first), name);
  }
  if (source.pattern.empty()) bad_value(place, node, "a source with a path");
  return source;
}

AverageWindow read_window(const YAML::Node& node, const Place& place) {
  AverageWindow window;
  if (!node.IsMap()) bad_value(place, node, "a window {every: ..., count: ...}");
  for (const auto& item : node) {
    const auto name = item.first.as<std::string>();
    const bool automatic = item.second.IsNull() || (item.second.IsScalar() && item.second.Scalar() == "auto");
    if (name == "every")
      read(item.second, place, window.every);
    else if (name == "count")
      read(item.second, place, window.count);
    else if (name == "eval")
      read(item.second, place, window.evaluate);
    else if (name == "start" && !automatic)
      read(item.second, place, window.start.emplace());
    else if (name != "start")
      fail(ExitCode::usage, "{}: key '{}' is not known; expected every, count, start or eval", place.at(item.first),
           name);
  }
  if (window.every < 1 || window.count < 1) bad_value(place, node, "a window with every and count of at least 1");
  return window;
}

}  // namespace

void read(const YAML::Node& node, const Place& place, std::string& out) { read_scalar(node, place, out, "text"); }
void read(const YAML::Node& node, const Place& place, bool& out) { read_scalar(node, place, out, "true or false"); }
void read(const YAML::Node& node, const Place& place, std::int64_t& out) {
  read_scalar(node, place, out, "a whole number");
}
void read(const YAML::Node& node, const Place& place, std::uint64_t& out) {
  if (!node.IsScalar() || node.Scalar().starts_with('-')) bad_value(place, node, "a whole number or a size like 24GiB");
  out = parse_bytes(node.Scalar(), place.at(node));
}
void read(const YAML::Node& node, const Place& place, double& out) { read_scalar(node, place, out, "a number"); }

void read(const YAML::Node& node, const Place& place, std::vector<DataSource>& out) {
  out.clear();
  if (node.IsSequence())
    for (const YAML::Node& item : node) out.push_back(read_source(item, place));
  else
    out.push_back(read_source(node, place));
}

void read(const YAML::Node& node, const Place& place, std::vector<AverageWindow>& out) {
  out.clear();
  if (!node.IsSequence() && !node.IsNull()) bad_value(place, node, "a list of windows {every: ..., count: ...}");
  for (const YAML::Node& item : node) out.push_back(read_window(item, place));
}

Json write(const std::string& value) { return value; }
Json write(bool value) { return value; }
Json write(std::int64_t value) { return value; }
Json write(std::uint64_t value) { return value; }
Json write(double value) { return value; }
Json write(const std::vector<DataSource>& value) {
  Json list = Json::array();
  for (const DataSource& source : value) list.push_back({{"path", source.pattern}, {"weight", source.weight}});
  return list;
}

Json write(const std::vector<AverageWindow>& value) {
  Json list = Json::array();
  for (const AverageWindow& window : value)
    list.push_back({{"every", window.every},
                    {"count", window.count},
                    {"start", window.start ? Json(*window.start) : Json("auto")},
                    {"eval", window.evaluate}});
  return list;
}

}  // namespace kiln::config_values

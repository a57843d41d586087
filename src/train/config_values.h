#pragma once
#include <yaml-cpp/yaml.h>

#include <string>

#include "train/config.h"

// How one value of the configuration is read from YAML and written to JSON. Private to config.cpp.
namespace kiln::config_values {

/// Where a value stands, for errors: "a.yaml:3:9: optimizer.kind" or "override optimizer.kind=x: optimizer.kind".
struct Place {
  std::string file;  // or "override ..."
  std::string key;
  bool has_line = true;
  std::string at(const YAML::Node& node) const;
};

[[noreturn]] void bad_value(const Place& place, const YAML::Node& node, std::string_view expected);

void read(const YAML::Node& node, const Place& place, std::string& out);
void read(const YAML::Node& node, const Place& place, bool& out);
void read(const YAML::Node& node, const Place& place, std::int64_t& out);
void read(const YAML::Node& node, const Place& place, std::uint64_t& out);
void read(const YAML::Node& node, const Place& place, double& out);
void read(const YAML::Node& node, const Place& place, std::vector<DataSource>& out);
void read(const YAML::Node& node, const Place& place, std::vector<AverageWindow>& out);

/// One spelling of a member of a closed vocabulary.
template <typename E>
struct Spelling {
  std::string_view name;
  E value;
};
template <typename E>
std::span<const Spelling<E>> spellings();

Json write(const std::string& value);
Json write(bool value);
Json write(std::int64_t value);
Json write(std::uint64_t value);
Json write(double value);
Json write(const std::vector<DataSource>& value);
Json write(const std::vector<AverageWindow>& value);

}  // namespace kiln::config_values

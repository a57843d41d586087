#pragma once
#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "report/metrics.h"

/// Calls of operator new in this program so far; defined in metrics_test.cpp.
extern std::atomic<long> allocations;

/// A directory of its own for one test, removed at the end.
struct TempDir {
  std::filesystem::path path;
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "kiln_report_XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  ~TempDir() { std::filesystem::remove_all(path); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
};

inline std::string slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void spill(const std::filesystem::path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline kiln::StepMetrics metrics_at(std::int64_t step) {
  const auto s = static_cast<double>(step);
  return {.step = step,
          .tokens = step * 1024,
          .loss = 10 / (1 + 0.1 * s),
          .lr = 1e-3 / s,
          .grad_norm = 0.7 / 3,
          .step_ms = 81.25,
          .tokens_per_s = 12345.678,
          .mfu = 0.4121,
          .memory_bytes = 3'221'225'472};
}

#pragma once
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "io/shard.h"

namespace kiln::test {

/// An empty directory of its own, removed with the object.
class Scratch {
 public:
  Scratch() {
    static std::atomic<int> number = 0;
    path_ = std::filesystem::temp_directory_path() / fmt::format("kiln-io-{}-{}", ::getpid(), number++);
    std::filesystem::create_directories(path_);
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, std::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
}

inline void write_shard(const std::filesystem::path& path, const std::vector<std::int32_t>& tokens,
                        std::int64_t vocab_size) {
  TokenShardWriter writer(path, vocab_size);
  writer.append(tokens);
  writer.finish();
}

/// The Error that `action` throws; an Error of code ok when it throws none.
template <typename Action>
Error error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return {ExitCode::ok, "no error was thrown"};
}

}  // namespace kiln::test

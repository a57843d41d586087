#pragma once
#include <filesystem>
#include <string_view>

namespace kiln {

/// A file that only grows. Each record goes out in one write() call, so that a reader of the live file sees whole
/// records and a crash tears the last one at most.
class AppendFile {
 public:
  enum class Open { append, create_new };

  /// `append` makes the file when it is missing; `create_new` leaves `is_open()` false when it exists already.
  /// A data Error when it cannot be opened, a resource Error when the disk is full.
  AppendFile(const std::filesystem::path& path, Open mode);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;
  AppendFile(AppendFile&& other) noexcept;
  AppendFile& operator=(AppendFile&& other) noexcept;

  bool is_open() const { return fd_ >= 0; }
  /// Does not allocate. A resource Error when the disk is full or takes only part of the record.
  void write(std::string_view record);

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace kiln

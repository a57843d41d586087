#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kiln {

/// A whole file as text; a data Error if it cannot be read.
std::string read_text(const std::filesystem::path& path);

/// Writes to a temporary file of this process beside `path`, fsyncs and renames, so that a reader sees the old file or
/// the new one, never half. A resource Error (disk full) or data Error otherwise; the old file then still stands.
void write_text_atomic(const std::filesystem::path& path, std::string_view text);

/// A file of what is measured once on a machine and kept between runs: in $KILN_CACHE_DIR, else kiln/ in the user's
/// cache directory; empty when the environment names neither. Spaces and slashes of `name` become dashes.
std::filesystem::path cache_file(std::string name);
/// fsync on a file or a directory (after a rename in it).
void sync_path(const std::filesystem::path& path);

/// Files that match a shell pattern (`*`, `?`, `[...]`), sorted; the path itself when it has no wildcard and exists.
/// A data Error when nothing matches, naming the pattern.
std::vector<std::filesystem::path> expand_glob(const std::string& pattern);

/// XXH3 (64 bits) of a file's bytes as 16 hexadecimal digits, and of memory.
std::string hash_file(const std::filesystem::path& path);
std::string hash_bytes(std::span<const std::byte> bytes);

/// hash_bytes of bytes that come in pieces.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  void add(std::span<const std::byte> bytes);
  std::string digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Read-only memory map of a file, closed with the object. A data Error if it cannot be opened.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  /// Says that it will be read from front to back, so that the system reads ahead of it.
  void expect_sequential() const;
  /// Gives the pages of a part of bytes() back to the system; they still read the same, from its cache or the file. So
  /// a pass over a large file keeps its resident memory small. Thread-safe.
  void release(std::span<const std::byte> bytes) const;

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A file for reading by copies, of which no memory stays resident. A data Error if the file cannot be opened.
class ReadFile {
 public:
  explicit ReadFile(const std::filesystem::path& path);
  ~ReadFile();
  ReadFile(const ReadFile&) = delete;
  ReadFile& operator=(const ReadFile&) = delete;
  /// Fills `out` from byte `offset` on; thread-safe. A data Error names the file when it ends before.
  void read(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  std::filesystem::path path_;
  int descriptor_;
};

}  // namespace kiln

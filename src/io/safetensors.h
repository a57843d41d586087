#pragma once
#include <atomic>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "core/tensor.h"

namespace kiln {

/// One entry of a safetensors header.
struct SafetensorEntry {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;   // any rank
  std::uint64_t begin = 0, end = 0;  // bytes, from the end of the header
};

/// Reads one `.safetensors` file through a memory map. Copies nothing until asked.
/// A data Error names the file and what is torn: short header, bad JSON, overlapping or missing bytes, size of a shape.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::filesystem::path& path);

  /// In the order of the bytes.
  const std::vector<SafetensorEntry>& entries() const { return entries_; }
  const SafetensorEntry* find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  std::span<const std::byte> bytes(const SafetensorEntry& entry) const;
  /// What stands before the first tensor.
  std::span<const std::byte> header() const { return file_.bytes().first(data_begin_); }
  /// Of a part of what bytes() gave (MappedFile).
  void release(std::span<const std::byte> bytes) const { file_.release(bytes); }
  /// Copies bytes(entry) from byte `offset` on, by a read and not through the map (ReadFile). Thread-safe.
  void read_bytes(const SafetensorEntry& entry, std::uint64_t offset, std::span<std::byte> out) const;
  /// Converts elements [first, first + out.size()) of f32, f64, bf16 or f16 storage to `out`.
  void read_floats(const SafetensorEntry& entry, std::uint64_t first, std::span<float> out) const;
  void read_floats(const SafetensorEntry& entry, std::uint64_t first, std::span<double> out) const;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  MappedFile file_;
  ReadFile reads_;
  std::vector<SafetensorEntry> entries_;
  std::map<std::string, std::string> metadata_;
  std::uint64_t data_begin_ = 0;
};

/// Writes one file as the reference writer lays it out: header keys by descending dtype size then name, header padded
/// with spaces to 8 bytes, `"__metadata__": {"format": "pt"}`. Data come in pieces: appended in the order of
/// `layout()`, or written in place in any order.
class SafetensorsWriter {
 public:
  struct Item {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
  };
  /// Creates the file and writes its header. A resource Error when the disk is full.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<Item> items,
                    std::map<std::string, std::string> metadata = {{"format", "pt"}});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// The items in the order in which their bytes must be appended.
  const std::vector<Item>& layout() const { return items_; }
  /// Where the data of item `index` begin in the file.
  std::uint64_t offset(std::size_t index) const { return offsets_.at(index); }
  /// Appends raw bytes of the current item or items; crossing into the next item is allowed.
  void append(std::span<const std::byte> bytes);
  /// Writes a piece of item `index` of layout() from byte `offset` of its data on. Thread-safe. Every byte once, and
  /// none of them by append().
  void write_at(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes);
  /// Starts to bring bytes [begin, end) of the file to the disk, as far as they were written, and returns: finish()
  /// then waits for less.
  void start_writeback(std::uint64_t begin, std::uint64_t end) const;
  /// Checks that every byte came, flushes and fsyncs. Without it the file is left torn, and readers refuse it.
  void finish();

 private:
  void reserve();
  void put(std::uint64_t at, std::span<const std::byte> bytes);

  std::filesystem::path path_;
  std::vector<Item> items_;
  std::vector<std::uint64_t> offsets_;  // of each item's data in the file
  std::uint64_t expected_ = 0;
  std::atomic<std::uint64_t> written_ = 0;
  int descriptor_ = -1;
};

/// Items as SafetensorsWriter lays them out: by descending dtype size, then name.
std::vector<SafetensorsWriter::Item> in_layout_order(std::vector<SafetensorsWriter::Item> items);

/// "F32" <-> DType::f32 and so on; a data Error for a dtype that is not known.
std::string_view safetensors_name(DType dtype);
DType safetensors_dtype(std::string_view name);

}  // namespace kiln

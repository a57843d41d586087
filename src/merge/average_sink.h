#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "io/safetensors.h"

namespace kiln {

/// Where averages go: every element once, in pieces, from several threads at a time.
class AverageSink {
 public:
  virtual ~AverageSink() = default;
  /// The tensors to average, in the order in which they are taken.
  virtual const std::vector<SafetensorsWriter::Item>& layout() const = 0;
  /// Where item `index` begins, in bytes; pieces end at multiples of their size.
  virtual std::uint64_t offset(std::size_t index) const = 0;
  /// A piece of item `index`, from byte `offset` of its data on. Thread-safe.
  virtual void put(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes) = 0;
  /// Bytes [begin, end) have been put, or will be soon: a hint to bring them where they go. Thread-safe.
  virtual void done(std::uint64_t begin, std::uint64_t end) = 0;
};

/// Into a file under construction, which it borrows.
class FileSink : public AverageSink {
 public:
  explicit FileSink(SafetensorsWriter& writer) : writer_(writer) {}
  const std::vector<SafetensorsWriter::Item>& layout() const override { return writer_.layout(); }
  std::uint64_t offset(std::size_t index) const override { return writer_.offset(index); }
  void put(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes) override {
    writer_.write_at(index, offset, bytes);
  }
  void done(std::uint64_t begin, std::uint64_t end) override { writer_.start_writeback(begin, end); }

 private:
  SafetensorsWriter& writer_;
};

}  // namespace kiln

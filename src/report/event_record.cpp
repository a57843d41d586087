#include "report/event_record.h"

#include <bit>
#include <cstring>

#include "base/error.h"

namespace kiln {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, reflected
constexpr std::uint32_t kMaskDelta = 0xA282EAD8;  // TFRecord: a CRC of data that holds CRCs is weak, so they are masked
constexpr std::size_t kHeaderBytes = 12;          // length and its masked CRC

// Keys of the protocol-buffer fields used: (field number << 3) | wire type.
constexpr unsigned kEventWallTime = 1 << 3 | 1;
constexpr unsigned kEventStep = 2 << 3 | 0;
constexpr unsigned kEventFileVersion = 3 << 3 | 2;
constexpr unsigned kEventSummary = 5 << 3 | 2;
constexpr unsigned kEventSessionLog = 7 << 3 | 2;
constexpr unsigned kSummaryValue = 1 << 3 | 2;
constexpr unsigned kValueTag = 1 << 3 | 2;
constexpr unsigned kValueSimple = 2 << 3 | 5;
constexpr unsigned kSessionStatus = 1 << 3 | 0;
constexpr unsigned kSessionStart = 1;

constexpr std::array<std::uint32_t, 256> make_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? kPolynomial : 0);
    table[i] = crc;
  }
  return table;
}
constexpr std::array<std::uint32_t, 256> kTable = make_table();

std::uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + kMaskDelta; }

std::size_t varint_bytes(std::uint64_t value) { return (static_cast<std::size_t>(std::bit_width(value | 1)) + 6) / 7; }

/// Bytes of a length-delimited field with a one-byte key.
std::size_t field_bytes(std::size_t length) { return 1 + varint_bytes(length) + length; }

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  std::uint32_t crc = ~0U;
  for (const char c : bytes) crc = crc >> 8 ^ kTable[(crc ^ static_cast<unsigned char>(c)) & 0xFF];
  return ~crc;
}

template <typename T>
void EventRecord::little_endian(std::size_t at, T value) {
  static_assert(std::endian::native == std::endian::little);
  std::memcpy(data_.data() + at, &value, sizeof value);
}

void EventRecord::varint(std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) byte(static_cast<unsigned>(value & 0x7F) | 0x80U);
  byte(static_cast<unsigned>(value));
}

void EventRecord::bytes(unsigned key, std::string_view text) {
  byte(key);
  varint(text.size());
  std::memcpy(data_.data() + size_, text.data(), text.size());
  size_ += text.size();
}

void EventRecord::begin(double wall_time_s, std::int64_t step) {
  size_ = kHeaderBytes;
  byte(kEventWallTime);
  little_endian(size_, wall_time_s);
  size_ += sizeof wall_time_s;
  if (step == 0) return;  // proto3 leaves out a field that holds its default
  byte(kEventStep);
  varint(static_cast<std::uint64_t>(step));
}

std::string_view EventRecord::finish() {
  const std::uint64_t length = size_ - kHeaderBytes;
  little_endian(0, length);
  little_endian(8, masked_crc({data_.data(), 8}));
  little_endian(size_, masked_crc({data_.data() + kHeaderBytes, length}));
  return {data_.data(), size_ + 4};
}

std::string_view EventRecord::file_version(double wall_time_s) {
  begin(wall_time_s, 0);
  bytes(kEventFileVersion, "brain.Event:2");
  return finish();
}

std::string_view EventRecord::session_start(double wall_time_s, std::int64_t step) {
  begin(wall_time_s, step);
  byte(kEventSessionLog);
  varint(2);
  byte(kSessionStatus);
  varint(kSessionStart);
  return finish();
}

std::string_view EventRecord::scalar(double wall_time_s, std::int64_t step, std::string_view tag, float value) {
  check(tag.size() <= kMaxTagBytes, "TensorBoard tag of {} bytes: at most {} are allowed; shorten it", tag.size(),
        kMaxTagBytes);
  begin(wall_time_s, step);
  const std::size_t value_bytes = field_bytes(tag.size()) + 1 + sizeof value;
  byte(kEventSummary);
  varint(field_bytes(value_bytes));
  byte(kSummaryValue);
  varint(value_bytes);
  bytes(kValueTag, tag);
  byte(kValueSimple);
  little_endian(size_, value);
  size_ += sizeof value;
  return finish();
}

}  // namespace kiln

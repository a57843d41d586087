#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace kiln {

/// CRC-32C (Castagnoli), RFC 3720 appendix B.4.
std::uint32_t crc32c(std::string_view bytes);

/// One record of a TensorBoard event file, encoded in place (nothing is allocated): TFRecord framing, that is
/// length u64 | masked crc32c of the length u32 | data | masked crc32c of the data u32, little endian, where the data
/// is a protocol-buffer `tensorflow.Event`. Each function returns the whole record; the view lives until the next call.
class EventRecord {
 public:
  static constexpr std::size_t kMaxTagBytes = 512;

  /// The first event of a file: `file_version` "brain.Event:2".
  std::string_view file_version(double wall_time_s);
  /// `session_log` START: readers drop what earlier files hold at `step` and later.
  std::string_view session_start(double wall_time_s, std::int64_t step);
  /// `summary` with one `simple_value`. A usage Error when the tag is longer than kMaxTagBytes.
  std::string_view scalar(double wall_time_s, std::int64_t step, std::string_view tag, float value);

 private:
  void begin(double wall_time_s, std::int64_t step);
  std::string_view finish();
  void byte(unsigned value) { data_[size_++] = static_cast<char>(value); }
  void varint(std::uint64_t value);
  void bytes(unsigned key, std::string_view text);
  template <typename T>
  void little_endian(std::size_t at, T value);

  std::array<char, kMaxTagBytes + 128> data_{};
  std::size_t size_ = 0;
};

}  // namespace kiln

#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace kiln {

/// The candidate with the smallest edit distance to `word` ("" when there is none).
std::string_view nearest(std::string_view word, std::span<const std::string_view> candidates);

/// 1536 -> "1.5 KiB".
std::string human_bytes(std::uint64_t bytes);
/// 58073088 -> "58.1M".
std::string human_count(double count);
/// 3725 s -> "1:02:05".
std::string human_seconds(double seconds);
/// "24GiB", "512MB", "1.5TiB", "4096" -> bytes; a usage Error names `what` otherwise.
std::uint64_t parse_bytes(std::string_view text, std::string_view what);

}  // namespace kiln

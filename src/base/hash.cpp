// Inlined, so that the hash runs on the vector units that this build is for, not on those of any processor.
#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>

#include "base/files.h"

namespace kiln {

std::string hash_bytes(std::span<const std::byte> bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

struct Hasher::State {
  XXH3_state_t xxh3;
};

Hasher::Hasher() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh3); }
Hasher::~Hasher() = default;

void Hasher::add(std::span<const std::byte> bytes) { XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size()); }

std::string Hasher::digest() const { return fmt::format("{:016x}", XXH3_64bits_digest(&state_->xxh3)); }

std::string hash_file(const std::filesystem::path& path) {
  constexpr std::size_t kPiece = std::size_t{8} << 20;
  const MappedFile file(path);
  Hasher hasher;
  for (std::size_t first = 0; first < file.bytes().size(); first += kPiece) {
    const std::span<const std::byte> piece = file.bytes().subspan(first, std::min(kPiece, file.bytes().size() - first));
    hasher.add(piece);
    file.release(piece);
  }
  return hasher.digest();
}

}  // namespace kiln

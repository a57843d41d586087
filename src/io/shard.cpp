#include "io/shard.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace kiln {
namespace {

constexpr std::size_t kHeaderWords = 256, kHeaderBytes = kHeaderWords * sizeof(std::int32_t);
constexpr std::int32_t kNarrowMagic = 20240520, kNarrowVersion = 1;  // uint16 tokens
constexpr std::int32_t kWideMagic = 20240801, kWideVersion = 7;      // uint32 tokens
constexpr std::size_t kPendingBytes = std::size_t{1} << 20;

void write_all(int descriptor, const std::byte* data, std::size_t size, const std::filesystem::path& path) {
  while (size > 0) {
    const ssize_t n = ::write(descriptor, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      fail(ExitCode::resource, "{}: writing failed ({}); free some space and try again", path.string(),
           std::strerror(errno));
    data += n;
    size -= static_cast<std::size_t>(n);
  }
}

std::filesystem::path temporary_of(const std::filesystem::path& path) { return path.string() + ".tmp"; }

}  // namespace

TokenShard::TokenShard(const std::filesystem::path& path) : path_(path), file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  if (bytes.size() < kHeaderBytes)
    fail(ExitCode::data, "{}: {} bytes, expected a header of {}; the shard is torn, make it again", path.string(),
         bytes.size(), kHeaderBytes);
  std::array<std::int32_t, 3> header;
  std::memcpy(header.data(), bytes.data(), sizeof(header));
  const auto [magic, version, count] = header;
  const bool narrow = magic == kNarrowMagic && version == kNarrowVersion;
  wide_ = magic == kWideMagic && version == kWideVersion;
  if (!narrow && !wide_)
    fail(ExitCode::data, "{}: magic {} version {}, expected {} version {} or {} version {}; it is no token shard",
         path.string(), magic, version, kNarrowMagic, kNarrowVersion, kWideMagic, kWideVersion);
  const std::size_t size = wide_ ? sizeof(std::uint32_t) : sizeof(std::uint16_t);
  if (count < 0 || bytes.size() != kHeaderBytes + static_cast<std::size_t>(count) * size)
    fail(ExitCode::data, "{}: {} bytes, expected {} for the {} tokens of its header; the shard is torn, make it again",
         path.string(), bytes.size(), kHeaderBytes + static_cast<std::size_t>(count) * size, count);
  count_ = count;
  tokens_ = bytes.data() + kHeaderBytes;
}

std::int32_t TokenShard::operator[](std::int64_t i) const {
  std::int32_t token = 0;
  read(i, {&token, 1});
  return token;
}

void TokenShard::read(std::int64_t first, std::span<std::int32_t> out) const {
  const auto at = static_cast<std::size_t>(first);
  if (wide_) {
    std::memcpy(out.data(), tokens_ + at * sizeof(std::uint32_t), out.size_bytes());
    return;
  }
  const std::byte* source = tokens_ + at * sizeof(std::uint16_t);
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::uint16_t token;
    std::memcpy(&token, source + i * sizeof(token), sizeof(token));
    out[i] = token;
  }
}

TokenShardWriter::TokenShardWriter(const std::filesystem::path& path, std::int64_t vocab_size)
    : path_(path), vocab_size_(vocab_size), wide_(vocab_size > 65536) {
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  descriptor_ = ::open(temporary_of(path).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail(ExitCode::data, "{}: cannot be written ({})", path.string(), std::strerror(errno));
  pending_.reserve(kPendingBytes + kHeaderBytes);
  pending_.resize(kHeaderBytes);
}

TokenShardWriter::~TokenShardWriter() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_of(path_).c_str());
}

void TokenShardWriter::append(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= vocab_size_)
      fail(ExitCode::data, "{}: token {} at {}, expected 0 to {}", path_.string(), token, count_, vocab_size_ - 1);
    const auto value = static_cast<std::uint32_t>(token);
    const std::size_t size = wide_ ? 4 : 2;
    for (std::size_t byte = 0; byte < size; ++byte)
      pending_.push_back(static_cast<std::byte>((value >> (8 * byte)) & 0xffu));
    ++count_;
    if (pending_.size() >= kPendingBytes) {
      write_all(descriptor_, pending_.data(), pending_.size(), path_);
      pending_.clear();
    }
  }
}

void TokenShardWriter::finish() {
  if (count_ > INT32_MAX)
    fail(ExitCode::data, "{}: {} tokens, a shard's header holds at most {}", path_.string(), count_, INT32_MAX);
  write_all(descriptor_, pending_.data(), pending_.size(), path_);
  std::array<std::int32_t, 3> header{wide_ ? kWideMagic : kNarrowMagic, wide_ ? kWideVersion : kNarrowVersion,
                                     static_cast<std::int32_t>(count_)};
  if (::pwrite(descriptor_, header.data(), sizeof(header), 0) != sizeof(header) || ::fsync(descriptor_) != 0)
    fail(ExitCode::resource, "{}: writing failed ({})", path_.string(), std::strerror(errno));
  ::close(descriptor_);
  descriptor_ = -1;
  std::filesystem::rename(temporary_of(path_), path_);
}

}  // namespace kiln

#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "base/files.h"

namespace kiln {

/// llm.c token shard: 256 int32 of header (magic, version, token count, zeros), then the tokens.
/// magic 20240520, version 1: uint16 tokens. magic 20240801, version 7: uint32 tokens.
class TokenShard {
 public:
  /// Maps the file. A data Error says what is wrong: no file, bad magic or version, fewer or more bytes than the count.
  explicit TokenShard(const std::filesystem::path& path);
  std::int64_t size() const { return count_; }
  std::int32_t operator[](std::int64_t i) const;
  /// Tokens [first, first + out.size()) as int32.
  void read(std::int64_t first, std::span<std::int32_t> out) const;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  MappedFile file_;
  const std::byte* tokens_ = nullptr;
  std::int64_t count_ = 0;
  bool wide_ = false;
};

/// Writes a shard under a temporary name and renames it when `finish` is called.
/// Tokens go as uint16 when the vocabulary fits, else uint32.
class TokenShardWriter {
 public:
  TokenShardWriter(const std::filesystem::path& path, std::int64_t vocab_size);
  ~TokenShardWriter();
  TokenShardWriter(const TokenShardWriter&) = delete;
  TokenShardWriter& operator=(const TokenShardWriter&) = delete;
  /// A data Error for a token outside [0, vocab_size).
  void append(std::span<const std::int32_t> tokens);
  std::int64_t size() const { return count_; }
  void finish();

 private:
  std::filesystem::path path_;
  std::int64_t vocab_size_, count_ = 0;
  bool wide_;
  std::vector<std::byte> pending_;
  int descriptor_ = -1;
};

}  // namespace kiln

#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "merge/average.h"

namespace kiln {

/// XXH3 of input files while they are averaged: bytes are hashed while a cache still holds them, and a file whose hash
/// nobody recorded, so that there is nothing to check before, is read once and not twice.
class InputHashes {
 public:
  /// Whether the file's tensors lie in the order of `layout`, in which averages are made; only then it is hashed.
  bool follow(const SafetensorsReader& file, const std::vector<SafetensorsWriter::Item>& layout);
  bool empty() const { return files_.empty(); }

  /// Call for every piece of every tensor; those of other files do nothing. A piece that comes before its turn is left
  /// to the thread that has it, so that none waits; threads that take pieces in order find them in a cache.
  /// Thread-safe.
  void add(const ModelTensors::Source& source, std::uint64_t first, std::uint64_t count);
  /// The hash of a file that was followed, after all its pieces.
  std::string digest(const SafetensorsReader& file) const;

 private:
  struct File {
    Hasher hasher{};
    std::mutex mutex{};                            // guards the rest
    std::size_t added = 0;                         // bytes, or under way
    bool busy = false;                             // a thread is hashing, and goes on with what waits
    std::map<std::size_t, std::size_t> waiting{};  // size of each piece whose turn has not come, by its place
  };
  std::map<const SafetensorsReader*, std::unique_ptr<File>> files_;
};

}  // namespace kiln

#include "merge/input_hashes.h"

#include <algorithm>
#include <limits>
#include <thread>

#include "base/error.h"

namespace kiln {
namespace {

constexpr int kTries = 256;
constexpr std::size_t kAborted = std::numeric_limits<std::size_t>::max();

}  // namespace

bool InputHashes::follow(const SafetensorsReader& file, const std::vector<SafetensorsWriter::Item>& layout) {
  auto at = layout.begin();
  for (const SafetensorEntry& entry : file.entries()) {
    at = std::find_if(at, layout.end(), [&](const SafetensorsWriter::Item& item) { return item.name == entry.name; });
    if (at == layout.end()) return false;
  }
  auto followed = std::make_unique<File>();
  const std::span<const std::byte> header = file.header();
  followed->hasher.add(header);
  followed->added = header.size();
  files_[&file] = std::move(followed);
  return true;
}

void InputHashes::add(const ModelTensors::Source& source, std::uint64_t first, std::uint64_t count) {
  const auto found = files_.find(source.file);
  if (found == files_.end()) return;
  File& file = *found->second;
  const std::span<const std::byte> bytes = bytes_of(source, first, count);
  const auto begin = static_cast<std::size_t>(bytes.data() - source.file->header().data());
  int tries = 0;
  for (std::size_t added = file.added; added != begin; added = file.added) {
    if (added == kAborted) return;
    // The thread before is most often almost done, and waking up takes longer than it needs.
    if (++tries < kTries)
      std::this_thread::yield();
    else
      file.added.wait(added);
  }
  file.hasher.add(bytes);
  std::size_t expected = begin;  // unless it was aborted meanwhile
  file.added.compare_exchange_strong(expected, begin + bytes.size());
  file.added.notify_all();
}

void InputHashes::abort() {
  for (const auto& [reader, file] : files_) {
    file->added = kAborted;
    file->added.notify_all();
  }
}

std::string InputHashes::digest(const SafetensorsReader& file) const {
  const File& followed = *files_.at(&file);
  std::size_t size = file.header().size();
  for (const SafetensorEntry& entry : file.entries()) size += entry.end - entry.begin;
  check(followed.added == size, "InputHashes::digest: {} of {} bytes of {} were added", followed.added.load(), size,
        file.path().string());
  return followed.hasher.digest();
}

}  // namespace kiln

#include "merge/input_hashes.h"

#include <algorithm>

#include "base/error.h"

namespace kiln {

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
  const std::byte* const start = source.file->header().data();
  std::unique_lock lock(file.mutex);
  file.waiting.emplace(static_cast<std::size_t>(bytes.data() - start), bytes.size());
  if (file.busy) return;
  file.busy = true;
  while (!file.waiting.empty() && file.waiting.begin()->first == file.added) {
    const std::size_t size = file.waiting.begin()->second;
    file.waiting.erase(file.waiting.begin());
    lock.unlock();
    file.hasher.add({start + file.added, size});  // busy: no other thread changes these two
    lock.lock();
    file.added += size;
  }
  file.busy = false;
}

std::string InputHashes::digest(const SafetensorsReader& file) const {
  const File& followed = *files_.at(&file);
  std::size_t size = file.header().size();
  for (const SafetensorEntry& entry : file.entries()) size += entry.end - entry.begin;
  check(followed.added == size, "InputHashes::digest: {} of {} bytes of {} were added", followed.added, size,
        file.path().string());
  return followed.hasher.digest();
}

}  // namespace kiln

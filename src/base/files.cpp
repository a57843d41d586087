#include "base/files.h"

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "base/error.h"

namespace kiln {
namespace {

/// Closes a descriptor when it leaves scope.
struct Descriptor {
  int value;
  explicit Descriptor(int fd) : value(fd) {}
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

ExitCode code_of(int error) { return error == ENOSPC || error == EDQUOT ? ExitCode::resource : ExitCode::data; }

}  // namespace

std::string read_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in || std::filesystem::is_directory(path))
    fail(ExitCode::data, "{}: cannot be read ({}); check the path", path.string(), std::strerror(errno));
  return {std::istreambuf_iterator<char>(in), {}};
}

void write_text_atomic(const std::filesystem::path& path, std::string_view text) {
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  const std::filesystem::path temporary = fmt::format("{}.{}.tmp", path.string(), ::getpid());
  {
    Descriptor file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (file.value < 0) fail(code_of(errno), "{}: cannot be written ({})", temporary.string(), std::strerror(errno));
    while (!text.empty()) {
      const ssize_t n = ::write(file.value, text.data(), text.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail(code_of(errno), "{}: writing failed ({})", temporary.string(), std::strerror(errno));
      text.remove_prefix(static_cast<std::size_t>(n));
    }
    if (::fsync(file.value) != 0)
      fail(code_of(errno), "{}: fsync failed ({})", temporary.string(), std::strerror(errno));
  }
  std::filesystem::rename(temporary, path);
  sync_path(path.has_parent_path() ? path.parent_path() : std::filesystem::path("."));
}

std::filesystem::path cache_file(std::string name) {
  for (char& c : name)
    if (c == ' ' || c == '/') c = '-';
  if (const char* directory = std::getenv("KILN_CACHE_DIR")) return std::filesystem::path(directory) / name;
  if (const char* cache = std::getenv("XDG_CACHE_HOME")) return std::filesystem::path(cache) / "kiln" / name;
  if (const char* home = std::getenv("HOME")) return std::filesystem::path(home) / ".cache" / "kiln" / name;
  return {};
}

void sync_path(const std::filesystem::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.value < 0 || ::fsync(file.value) != 0)
    fail(code_of(errno), "{}: fsync failed ({})", path.string(), std::strerror(errno));
}

std::vector<std::filesystem::path> expand_glob(const std::string& pattern) {
  glob_t found{};
  const int status = ::glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<std::filesystem::path> paths;
  for (std::size_t i = 0; status == 0 && i < found.gl_pathc; ++i) paths.emplace_back(found.gl_pathv[i]);
  ::globfree(&found);
  if (paths.empty()) fail(ExitCode::data, "{}: no file matches; check the path or make the files first", pattern);
  return paths;
}

MappedFile::MappedFile(const std::filesystem::path& path) {
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info {};
  if (file.value < 0 || ::fstat(file.value, &info) != 0 || !S_ISREG(info.st_mode))
    fail(ExitCode::data, "{}: cannot be opened ({}); check the path", path.string(),
         file.value < 0 ? std::strerror(errno) : "not a regular file");
  size_ = static_cast<std::size_t>(info.st_size);
  if (size_ == 0) return;
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.value, 0);
  if (address == MAP_FAILED) fail(ExitCode::resource, "{}: mmap failed ({})", path.string(), std::strerror(errno));
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

// Advice only, here and below: what fails costs time or memory, not correctness.
void MappedFile::expect_sequential() const { ::madvise(const_cast<std::byte*>(data_), size_, MADV_SEQUENTIAL); }

void MappedFile::release(std::span<const std::byte> bytes) const {
  // The system maps huge pages whole, so a piece leaves nothing behind only if all of those that it touches are given
  // up.
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto base = reinterpret_cast<std::uintptr_t>(data_);
  const auto begin = base + (reinterpret_cast<std::uintptr_t>(bytes.data()) - base) / kHugePage * kHugePage;
  const auto end = reinterpret_cast<std::uintptr_t>(bytes.data() + bytes.size());
  ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

ReadFile::ReadFile(const std::filesystem::path& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0)
    fail(ExitCode::data, "{}: cannot be opened ({}); check the path", path.string(), std::strerror(errno));
}

ReadFile::~ReadFile() { ::close(descriptor_); }

void ReadFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t n = ::pread(descriptor_, out.data(), out.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      fail(ExitCode::data, "{}: cannot be read at byte {} ({}); check the disk, or copy the file again", path_.string(),
           offset, n < 0 ? std::strerror(errno) : "the file has ended");
    out = out.subspan(static_cast<std::size_t>(n));
    offset += static_cast<std::uint64_t>(n);
  }
}

}  // namespace kiln

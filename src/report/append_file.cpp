#include "report/append_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace kiln {
namespace {

ExitCode code_of(int error) { return error == ENOSPC || error == EDQUOT ? ExitCode::resource : ExitCode::data; }

}  // namespace

AppendFile::AppendFile(const std::filesystem::path& path, Open mode) : path_(path) {
  const int exclusive = mode == Open::create_new ? O_EXCL : 0;
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | exclusive, 0644);
  if (fd_ < 0 && !(mode == Open::create_new && errno == EEXIST))
    fail(code_of(errno), "{}: cannot be opened for appending ({}); check the directory and its permissions",
         path.string(), std::strerror(errno));
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) ::close(fd_);
}

AppendFile::AppendFile(AppendFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

AppendFile& AppendFile::operator=(AppendFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

void AppendFile::write(std::string_view record) {
  ssize_t written = 0;
  do {
    written = ::write(fd_, record.data(), record.size());
  } while (written < 0 && errno == EINTR);
  if (written < 0)
    fail(code_of(errno), "{}: writing failed ({}); free some space or check the disk, then resume", path_.string(),
         std::strerror(errno));
  if (static_cast<std::size_t>(written) != record.size())
    fail(ExitCode::resource, "{}: only {} of {} bytes could be written; free some space on the disk, then resume",
         path_.string(), written, record.size());
}

}  // namespace kiln

#pragma once
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>

namespace kiln {

/// Text of at most N bytes in place, so that formatting in the training loop never allocates. What does not fit is cut.
template <std::size_t N>
class FixedText {
 public:
  template <typename... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) {
    const auto result = fmt::format_to_n(text_.data() + size_, N - size_, format, std::forward<Args>(args)...);
    size_ += std::min(result.size, N - size_);
  }
  void add_text(std::string_view text) {
    const std::size_t n = std::min(text.size(), N - size_);
    std::copy_n(text.data(), n, text_.data() + size_);
    size_ += n;
  }
  void clear() { size_ = 0; }
  bool full() const { return size_ == N; }
  std::string_view view() const { return {text_.data(), size_}; }

 private:
  std::array<char, N> text_;
  std::size_t size_ = 0;
};

}  // namespace kiln

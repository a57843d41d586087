#include "report/progress.h"

#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "base/text.h"

namespace kiln {
namespace {

constexpr double kRedrawSeconds = 0.05;
constexpr int kMinBar = 8, kMaxBar = 32, kDefaultColumns = 100;

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool is_terminal(int fd) {
  const char* term = std::getenv("TERM");
  return ::isatty(fd) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

bool has_unicode() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    const std::string_view locale(value);
    return locale.find("UTF-8") != std::string_view::npos || locale.find("utf8") != std::string_view::npos;
  }
  return false;
}

void put(int fd, std::string_view a, std::string_view b = {}, std::string_view c = {}) {
  std::array<iovec, 3> parts{};
  const std::array<std::string_view, 3> texts{a, b, c};
  for (std::size_t i = 0; i < parts.size(); ++i) parts[i] = {const_cast<char*>(texts[i].data()), texts[i].size()};
  [[maybe_unused]] const ssize_t ignored = ::writev(fd, parts.data(), static_cast<int>(parts.size()));
}

/// One part of the line: a dim label, a value, and its rank: the highest are left out first.
struct Field {
  std::string_view label;
  FixedText<32> value;
  int rank = 0;
  bool shown = true;
  int width() const { return static_cast<int>(label.size() + value.view().size()) + (label.empty() ? 0 : 1); }
};

/// The fields of a state in the order of the line; those without a value are left out.
struct Fields {
  std::array<Field, 9> items;
  std::size_t count = 0;

  template <typename... Args>
  void add(int rank, std::string_view label, fmt::format_string<Args...> format, Args&&... args) {
    Field& field = items[count++];
    field.rank = rank;
    field.label = label;
    field.value.add(format, std::forward<Args>(args)...);
  }
  int width() const {
    int sum = 0;
    for (std::size_t i = 0; i < count; ++i)
      if (items[i].shown) sum += items[i].width() + 2;
    return sum;
  }
  /// Leaves out the highest rank still shown, `lowest` at least; false when there is none.
  bool drop_one(int lowest) {
    Field* worst = nullptr;
    for (std::size_t i = 0; i < count; ++i)
      if (items[i].shown && items[i].rank >= lowest && (worst == nullptr || items[i].rank > worst->rank))
        worst = &items[i];
    if (worst != nullptr) worst->shown = false;
    return worst != nullptr;
  }
};

Fields fields_of(const StepMetrics& m, std::int64_t total, double valid_loss, double seconds_left) {
  Fields fields;
  fields.add(0, "", "{}/{}", m.step, total);
  if (std::isfinite(seconds_left)) fields.add(1, "eta", "{}", human_seconds(seconds_left));
  fields.add(0, "loss", "{:.4f}", m.loss);
  if (std::isfinite(valid_loss)) fields.add(2, "valid", "{:.4f}", valid_loss);
  fields.add(4, "lr", "{:.2e}", m.lr);
  fields.add(5, "grad", "{:.3g}", m.grad_norm);
  if (m.tokens_per_s > 0) fields.add(3, "", "{} tok/s", human_count(m.tokens_per_s));
  if (m.mfu > 0) fields.add(7, "mfu", "{:.1f}%", 100 * m.mfu);
  if (m.memory_bytes > 0) fields.add(6, "mem", "{}", human_bytes(m.memory_bytes));
  return fields;
}

template <std::size_t N>
void add_bar(FixedText<N>& line, int cells, double fraction, bool unicode) {
  const int filled = static_cast<int>(std::lround(fraction * cells));
  if (!unicode) line.add_text("[");
  for (int i = 0; i < cells; ++i) line.add_text(unicode ? (i < filled ? "━" : "─") : (i < filled ? "=" : " "));
  line.add_text(unicode ? " " : "] ");
}

}  // namespace

ProgressLine::ProgressLine(const ProgressOptions& options)
    : options_(options), valid_loss_(std::numeric_limits<double>::quiet_NaN()) {
  if (options_.clock_s == nullptr) options_.clock_s = steady_seconds;
  terminal_ = options_.terminal.value_or(is_terminal(options_.fd));
  colour_ = terminal_ && options_.colour.value_or(std::getenv("NO_COLOR") == nullptr);
  unicode_ = terminal_ && options_.unicode.value_or(has_unicode());
  start_s_ = options_.clock_s();
}

ProgressLine::~ProgressLine() { finish(); }

int ProgressLine::columns() const {
  if (options_.width) return *options_.width;
  winsize size{};
  return ::ioctl(options_.fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kDefaultColumns;
}

double ProgressLine::seconds_left() const {
  const std::int64_t done = last_.step - options_.first_step;
  if (done <= 0) return std::numeric_limits<double>::quiet_NaN();
  const double each = (options_.clock_s() - start_s_) / static_cast<double>(done);
  return each * static_cast<double>(std::max<std::int64_t>(options_.total_steps - last_.step, 0));
}

void ProgressLine::update(const StepMetrics& metrics) {
  if (finished_) return;
  last_ = metrics;
  started_ = true;
  if (metrics.valid_loss) valid_loss_ = *metrics.valid_loss;
  const double elapsed = options_.clock_s() - drawn_s_;
  const bool always = drawn_step_ < 0 || metrics.step >= options_.total_steps;
  if (terminal_) {
    if (always || elapsed >= kRedrawSeconds) draw();
  } else if (always || metrics.valid_loss ||
             (elapsed >= options_.plain_seconds && metrics.step - drawn_step_ >= options_.plain_steps)) {
    print_plain();
  }
}

void ProgressLine::draw() {
  const double fraction =
      options_.total_steps > 0 ? static_cast<double>(last_.step) / static_cast<double>(options_.total_steps) : 0;
  Fields fields = fields_of(last_, options_.total_steps, valid_loss_, seconds_left());
  const int room = columns() - 1 - 4;  // the last column stays free: writing it would wrap; "100%" takes four
  const int frame = unicode_ ? 1 : 3;
  while (fields.width() + frame + kMinBar > room && fields.drop_one(1)) {
  }
  while (fields.width() > room && fields.drop_one(0)) {  // too narrow for a bar in any case
  }
  const int cells = std::min(room - fields.width() - frame, kMaxBar);
  line_.clear();
  line_.add_text("\r");
  if (colour_) line_.add_text("\x1b[36m");
  if (cells >= kMinBar) add_bar(line_, cells, std::clamp(fraction, 0.0, 1.0), unicode_);
  if (colour_) line_.add_text("\x1b[0m");
  line_.add("{:3.0f}%", std::floor(100 * fraction));
  for (std::size_t i = 0; i < fields.count; ++i) {
    const Field& field = fields.items[i];
    if (!field.shown) continue;
    line_.add_text("  ");
    if (!field.label.empty()) line_.add("{}{}{} ", colour_ ? "\x1b[2m" : "", field.label, colour_ ? "\x1b[0m" : "");
    line_.add_text(field.value.view());
  }
  line_.add_text("\x1b[K");
  put(options_.fd, line_.view());
  drawn_s_ = options_.clock_s();
  drawn_step_ = last_.step;
}

void ProgressLine::print_plain() {
  const Fields fields = fields_of(last_, options_.total_steps, valid_loss_, seconds_left());
  line_.clear();
  line_.add_text("step ");
  for (std::size_t i = 0; i < fields.count; ++i) {
    const Field& field = fields.items[i];
    line_.add("{}{}{}{}", i == 0 ? "" : "  ", field.label, field.label.empty() ? "" : " ", field.value.view());
  }
  put(options_.fd, line_.view(), "\n");
  drawn_s_ = options_.clock_s();
  drawn_step_ = last_.step;
}

void ProgressLine::message(std::string_view text) {
  if (!terminal_ || finished_) return put(options_.fd, text, "\n");
  put(options_.fd, "\r\x1b[K", text, "\n");
  if (started_) draw();
}

void ProgressLine::finish() {
  if (finished_) return;
  finished_ = true;
  if (!started_) return;
  if (terminal_) {
    draw();
    put(options_.fd, "\n");
  } else if (drawn_step_ != last_.step) {
    print_plain();
  }
}

}  // namespace kiln

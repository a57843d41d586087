#include "report/progress.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "catch.h"
#include "support.h"

using namespace kiln;

namespace {

double now_s = 0;

/// A file to write to, and what was written.
struct Sink {
  TempDir dir;
  int fd = ::open((dir.path / "out").c_str(), O_RDWR | O_CREAT, 0600);
  ~Sink() { ::close(fd); }
  std::string text() const { return slurp(dir.path / "out"); }
};

ProgressOptions options_for(const Sink& sink, bool terminal, int width = 120) {
  now_s = 1000;
  return {.total_steps = 1000,
          .plain_steps = 10,
          .plain_seconds = 10,
          .fd = sink.fd,
          .terminal = terminal,
          .colour = false,
          .unicode = false,
          .width = width,
          .clock_s = [] { return now_s; }};
}

/// What stands on the terminal's last line after all redraws.
std::string last_line(std::string text) {
  if (!text.empty() && text.back() == '\n') text.pop_back();
  text = text.substr(text.find_last_of("\r\n") + 1);
  const std::size_t erase = text.find("\x1b[K");
  return text.substr(0, erase);
}

std::size_t lines(const std::string& text) {
  return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}

}  // namespace

TEST_CASE("progress: the terminal line has every field, and finish ends it") {
  Sink sink;
  ProgressLine line(options_for(sink, true, 160));
  now_s += 420;
  StepMetrics m = metrics_at(420);
  m.valid_loss = 3.5;
  line.update(m);
  CHECK(last_line(sink.text()) ==
        "[=============                   ]  42%  420/1000  eta 9:40  loss 0.2326  valid 3.5000  lr 2.38e-06  "
        "grad 0.233  12.3k tok/s  mfu 41.2%  mem 3.00 GiB");
  CHECK(lines(sink.text()) == 0);
  line.finish();
  line.finish();
  line.update(m);
  CHECK(lines(sink.text()) == 1);
}

TEST_CASE("progress: the line never reaches the last column, whatever the width") {
  const int width = GENERATE(5, 12, 20, 30, 40, 60, 80, 100, 120, 300);
  Sink sink;
  ProgressLine line(options_for(sink, true, width));
  line.update(metrics_at(999));
  const std::string drawn = last_line(sink.text());
  CHECK(static_cast<int>(drawn.size()) < width);
  if (width >= 40) {
    CHECK_THAT(drawn, ContainsSubstring("loss"));
    CHECK_THAT(drawn, ContainsSubstring("999/1000"));
  }
}

TEST_CASE("progress: redraws at most 20 times a second, and always the last step") {
  Sink sink;
  ProgressLine line(options_for(sink, true));
  for (int step = 1; step <= 1000; ++step) {
    now_s += 0.001;
    line.update(metrics_at(step));
  }
  const std::string text = sink.text();
  const auto drawn = std::count(text.begin(), text.end(), '\r');
  CHECK(drawn >= 20);
  CHECK(drawn <= 22);
  CHECK_THAT(last_line(text), ContainsSubstring("100%  1000/1000"));
}

TEST_CASE("progress: a message stands above the line") {
  Sink sink;
  ProgressLine line(options_for(sink, true));
  line.message("before");
  line.update(metrics_at(1));
  line.message("saved step 1");
  const std::string text = sink.text();
  CHECK(text.starts_with("\r\x1b[Kbefore\n\r["));
  CHECK_THAT(text, ContainsSubstring("\r\x1b[Ksaved step 1\n\r["));
}

TEST_CASE("progress: colour and box characters only when asked for") {
  Sink sink;
  ProgressOptions options = options_for(sink, true);
  options.colour = true;
  options.unicode = true;
  ProgressLine line(options);
  line.update(metrics_at(500));
  CHECK_THAT(sink.text(), ContainsSubstring("\x1b[36m━"));
  CHECK_THAT(sink.text(), ContainsSubstring("\x1b[2mloss\x1b[0m "));
}

TEST_CASE("progress: without a terminal, plain lines now and then") {
  Sink sink;
  ProgressLine line(options_for(sink, false));
  for (int step = 1; step <= 995; ++step) {
    now_s += 0.5;
    StepMetrics m = metrics_at(step);
    if (step == 500) m.valid_loss = 2.0;
    line.update(m);
  }
  const std::size_t before = lines(sink.text());
  CHECK(before == 1 + 24 + 1 + 24);  // the first, each 20 steps (10 s), the validation, each 20 steps after it
  line.finish();
  CHECK(lines(sink.text()) == before + 1);
  CHECK_THAT(last_line(sink.text()), ContainsSubstring("step 995/1000  eta 0:03  loss 0.0995"));
  CHECK(sink.text().find('\x1b') == std::string::npos);
  CHECK(sink.text().find('\r') == std::string::npos);
}

TEST_CASE("progress: without a terminal, slow steps print each ten steps at the most") {
  Sink sink;
  ProgressLine line(options_for(sink, false));
  for (int step = 1; step <= 31; ++step) {
    now_s += 60;
    line.update(metrics_at(step));
  }
  CHECK(lines(sink.text()) == 4);  // steps 1, 11, 21, 31
}

TEST_CASE("progress: a resumed run's time left counts only its own steps") {
  Sink sink;
  ProgressOptions options = options_for(sink, true, 160);
  options.first_step = 900;
  ProgressLine line(options);
  now_s += 100;
  line.update(metrics_at(950));
  CHECK_THAT(last_line(sink.text()), ContainsSubstring("eta 1:40"));
}

TEST_CASE("progress: drawing does not allocate") {
  const bool terminal = GENERATE(true, false);
  Sink sink;
  ProgressLine line(options_for(sink, terminal));
  const long before = allocations;
  for (int step = 1; step <= 100; ++step) {
    now_s += 1e6;
    line.update(metrics_at(step));
  }
  line.message("a text that is much longer than a short string could hold in place");
  CHECK(allocations == before);
}

#include "base/signals.h"

#include <csignal>

namespace kiln {
namespace {

volatile std::sig_atomic_t received = 0;

extern "C" void on_stop_signal(int number) {
  if (received != 0) {
    std::signal(number, SIG_DFL);
    std::raise(number);
  }
  received = number;
}

}  // namespace

void install_stop_signals() {
  std::signal(SIGINT, on_stop_signal);
  std::signal(SIGTERM, on_stop_signal);
}

int stop_signal() { return received; }

}  // namespace kiln

#pragma once

namespace kiln {

/// SIGINT and SIGTERM ask for a clean stop from now on; a second one ends the process at once.
void install_stop_signals();

/// The signal that asked for a stop, 0 before.
int stop_signal();

}  // namespace kiln

#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace kiln {

/// A thread that does one job at a time beside its owner's. post() and wait() come from one thread at a time.
class Worker {
 public:
  /// Its parallel_for may use as many threads as that of the thread which makes it.
  Worker();
  /// Finishes the job under way; its error is lost.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  /// Waits for the job before, then hands over this one and returns. Throws what the one before threw.
  void post(std::function<void()> job);
  /// Waits until no job is under way; throws what the last one threw.
  void wait();
  /// Whether the next call will throw; does not wait.
  bool failed() const;

 private:
  void run(int threads);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;  // empty: idle
  std::exception_ptr error_;
  bool stop_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace kiln

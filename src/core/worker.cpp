#include "core/worker.h"

#include <utility>

#include "core/parallel.h"

namespace kiln {

Worker::Worker() : thread_([this, threads = thread_count()] { run(threads); }) {}

Worker::~Worker() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Worker::post(std::function<void()> job) {
  wait();
  {
    const std::lock_guard lock(mutex_);
    job_ = std::move(job);
  }
  changed_.notify_all();
}

void Worker::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !job_; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

bool Worker::failed() const {
  const std::lock_guard lock(mutex_);
  return error_ != nullptr;
}

void Worker::run(int threads) {
  set_thread_count(threads);  // OpenMP counts for each thread
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stop_ || job_; });
    if (!job_) return;
    lock.unlock();
    std::exception_ptr error;
    try {
      job_();
    } catch (...) {  // must not leave the thread; the owner's next call throws it
      error = std::current_exception();
    }
    lock.lock();
    error_ = error;
    job_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace kiln

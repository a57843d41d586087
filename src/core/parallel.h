#pragma once
#include <cstdint>
#include <type_traits>

namespace kiln {

/// Threads that parallel_for may use (OMP_NUM_THREADS, or the machine's cores divided by the ranks on it).
int thread_count();
void set_thread_count(int threads);

namespace detail {
using RangeBody = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_ranges(std::int64_t count, std::int64_t grain, RangeBody body, void* context);
}  // namespace detail

/// Calls body(begin, end) on disjoint ranges that cover [0, count), one range a thread, none shorter than `grain`.
/// The split depends on count, grain and the thread count alone, so results do not vary between runs. No allocation.
/// The body must not throw.
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t grain, Body&& body) {
  detail::parallel_ranges(
      count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace kiln

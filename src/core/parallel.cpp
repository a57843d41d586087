#include "core/parallel.h"

#include <omp.h>

#include <algorithm>

namespace kiln {

int thread_count() { return omp_get_max_threads(); }
void set_thread_count(int threads) { omp_set_num_threads(std::max(1, threads)); }

void detail::parallel_ranges(std::int64_t count, std::int64_t grain, RangeBody body, void* context) {
  if (count <= 0) return;
  const std::int64_t most = std::max<std::int64_t>(1, count / std::max<std::int64_t>(1, grain));
  const int threads = static_cast<int>(std::min<std::int64_t>(thread_count(), most));
  if (threads <= 1 || omp_in_parallel() != 0) {
    body(context, 0, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t t = omp_get_thread_num();
    const std::int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    if (begin < end) body(context, begin, end);
  }
}

}  // namespace kiln

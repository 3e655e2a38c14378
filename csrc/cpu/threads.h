// Parallel loops on OpenMP threads. The result of a task never depends on the number of threads.
#pragma once

#include <omp.h>

#include "types.h"

namespace lorafast {

// Runs body() on every thread of a team of `threads` threads.
template <class Body>
inline void parallel(int threads, Body&& body) {
  // One thread needs no team. In a forked child a team must not be requested: the threads that
  // OpenMP started in the parent do not exist there.
  if (threads == 1) return body();
#pragma omp parallel num_threads(threads)
  body();
}

// Called by every thread of a team: runs task(i) for every i < count, and returns when all are
// done. Each thread takes one contiguous run of tasks, so that threads share few cache lines.
template <class Task>
inline void parallel_for(int64_t count, Task&& task) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace lorafast

// Tasks on torch's own number of threads. What a task computes never depends on how many there are.
#pragma once

#include <omp.h>

#include "types.h"

namespace lorafast {

// Runs body() on every thread of a team.
template <class Body>
inline void team(int threads, Body&& body) {
  // One alone needs no team, and in a forked child must not ask for one: its parent's threads are not there.
  if (threads == 1) return body();
#pragma omp parallel num_threads(threads)
  body();
}

// Inside a team: task(i) for every i; all are done when it returns. Each thread has a run of them, so that no two work on the same
// rows: those that do fetch each other's lines.
template <class Task>
inline void each(int64_t count, Task&& task) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace lorafast

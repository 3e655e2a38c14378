// What a kernel needs beyond its stack, for as long as it runs.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "types.h"

namespace lorafast {

class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    const int64_t bytes = round_up(at_least(floats, 1) * sizeof(float), 64);
    data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
    int64_t seen = most.load(std::memory_order_relaxed);
    while (seen < bytes && !most.compare_exchange_weak(seen, bytes, std::memory_order_relaxed)) {
    }
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  operator float*() const { return data; }

  // The largest one, in bytes, since this was last asked: torch's allocator does not see them.
  static int64_t largest() { return most.exchange(0); }

 private:
  inline static std::atomic<int64_t> most{0};
  float* data;
};

}  // namespace lorafast

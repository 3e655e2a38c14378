// The memory that a kernel needs beyond its stack, freed when the kernel returns.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>

#include "types.h"

namespace lorafast {

class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    const int64_t bytes = round_up(max(floats, 1) * sizeof(float), 64);
    data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
    int64_t seen = peak.load(std::memory_order_relaxed);
    while (seen < bytes && !peak.compare_exchange_weak(seen, bytes, std::memory_order_relaxed)) {
    }
  }
  ~Workspace() { std::free(data); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  operator float*() const { return data; }

  // The size in bytes of the largest workspace since the last call. torch's allocator does not
  // count workspaces.
  static int64_t largest() { return peak.exchange(0); }

 private:
  inline static std::atomic<int64_t> peak{0};
  float* data;
};

}  // namespace lorafast

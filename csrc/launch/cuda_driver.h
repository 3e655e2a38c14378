// What of CUDA's driver launches need; its functions are found where they run.
#pragma once

#include <array>
#include <cstddef>

namespace lorafast::launches {

// The configuration of a launch as cuda.h has it since CUDA 11.8.
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
using LaunchKernel = int (*)(const LaunchConfig*, void* function, void** params, void** extra);

struct alignas(128) TensorMap {
  std::array<std::byte, 128> bytes;
};

}  // namespace lorafast::launches

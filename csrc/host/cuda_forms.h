// Forms of the CUDA kernels in csrc/cuda, and their launches: lorafast/engine/cuda_forms.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>

#include "../launch/cuda_driver.h"

namespace lorafast::host::cuda {

// The kernels, by the names of their files in the order of STEMS.
enum class Stem : uint8_t {
  project,
  project_finish,
  decode,
  decode_finish,
  grad_output,
  grad_output_finish,
  grad_project,
  sum_parts,
  low_rank_add,
  row_norm,
  quotient,
  scale,
  drop,
};
constexpr const char* STEMS[] = {"project",       "project_finish", "decode",
                                 "decode_finish", "grad_output",    "grad_output_finish",
                                 "grad_project",  "sum_parts",      "low_rank_add",
                                 "row_norm",      "quotient",       "scale",
                                 "drop"};

// Flags of every kernel that has them.
constexpr int DROPS = 1, ALIGNED = 2;

// One compilation of one kernel: Form of the twin.
struct Form {
  Stem stem;
  at::ScalarType dtype;
  int tiles = 2;
  int flags = 0;
  bool tf32 = false;
};

// The number by which kernels know a dtype.
int32_t dtype_number(at::ScalarType dtype);

// True if torch multiplies fp32 in tf32 on GPUs.
bool in_tf32();

// The form of a kernel that multiplies: fp32 in tf32 where torch's own products do.
inline Form form_of(Stem stem, at::ScalarType dtype, int tiles = 2, int flags = 0) {
  return {stem, dtype, tiles, flags, dtype == at::kFloat && in_tf32()};
}

// The handle of torch's current stream of a device. A CPU stands for a GPU in tests, and has none.
void* stream_of(at::Device device);

// A form that CUDA has loaded on a device.  parameters: a letter each, as in KERNELS of the twin.
struct Function {
  launches::LaunchKernel launch = nullptr;
  void* function = nullptr;
  unsigned threads = 0;
  std::string parameters;
};

// The values of a kernel's parameters, each of its size.
inline const void* parameter(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr() : nullptr;
}
inline int64_t parameter(int64_t value) { return value; }
inline int32_t parameter(int32_t value) { return value; }
inline uint32_t parameter(uint32_t value) { return value; }
inline float parameter(float value) { return value; }

template <typename Value>
constexpr char letter() {
  if constexpr (std::is_pointer_v<Value>) return 'p';
  if constexpr (std::is_same_v<Value, float>) return 'f';
  return sizeof(Value) == 8 ? 'q' : 'i';
}

using Grid = std::array<int64_t, 3>;

// The forms of one device.
class Device {
 public:
  Device(at::Device own, int64_t count) : device(own), multiprocessors(count) {}

  // Launch a form on torch's current stream; the first time it may be compiled, by Python.
  template <typename... Values>
  void launch(const Form& form, const Grid& grid, const Values&... values) const {
    auto held = std::make_tuple(parameter(values)...);
    static constexpr char letters[] = {
        letter<decltype(parameter(std::declval<const Values&>()))>()..., 0};
    std::apply(
        [&](auto&... each) {
          void* params[] = {&each...};
          run(form, grid, letters, params);
        },
        held);
  }

  const at::Device device;
  const int64_t multiprocessors;

 private:
  void run(const Form& form, const Grid& grid, std::string_view letters, void** params) const;
  const Function& loaded(const Form& form) const;

  mutable std::mutex mutex;
  mutable std::unordered_map<uint64_t, Function> functions;
};

}  // namespace lorafast::host::cuda

#include "cuda_forms.h"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "python.h"

namespace lorafast::host::cuda {
namespace {

// The most blocks of a grid along its second and third side.
constexpr int64_t MOST_BLOCKS = 65535;

uint64_t key_of(const Form& form) {
  uint64_t key = 0;
  for (const int part : {static_cast<int>(form.stem), static_cast<int>(form.dtype), form.tiles,
                         form.flags, static_cast<int>(form.tf32)})
    key = key << 8 | static_cast<uint8_t>(part);
  return key;
}

}  // namespace

void* stream_of(at::Device device) {
  if (device.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

int32_t dtype_number(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return 0;
    case at::kHalf:
      return 1;
    case at::kFloat:
      return 2;
    default:
      TORCH_CHECK(false, "the CUDA kernels compute in bf16, fp16 and fp32, not in ", dtype);
  }
}

bool in_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

const Function& Device::loaded(const Form& form) const {
  const uint64_t key = key_of(form);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = functions.find(key); found != functions.end()) return found->second;
  }
  // Python may run other threads meanwhile, which may load the same form: both are as good.
  Function made = load_form(device, form);
  const std::lock_guard<std::mutex> lock(mutex);
  return functions.try_emplace(key, std::move(made)).first->second;
}

void Device::run(const Form& form, const Grid& grid, std::string_view letters,
                 void** params) const {
  const Function& kernel = loaded(form);
  TORCH_CHECK(kernel.parameters == letters, STEMS[static_cast<int>(form.stem)], " takes ",
              kernel.parameters, ", not ", letters);
  launches::LaunchConfig config{};
  for (int i = 0; i < 3; ++i) {
    if (!grid[i]) return;
    TORCH_CHECK(i == 0 || grid[i] <= MOST_BLOCKS, "size ", i, " of the grid is ", grid[i]);
    config.grid[i] = static_cast<unsigned>(grid[i]);
  }
  config.block[0] = kernel.threads;
  config.block[1] = config.block[2] = 1;
  config.stream = stream_of(device);
  const int error = kernel.launch(&config, kernel.function, params, nullptr);
  TORCH_CHECK(!error, "CUDA refuses the launch: error ", error);
}

}  // namespace lorafast::host::cuda

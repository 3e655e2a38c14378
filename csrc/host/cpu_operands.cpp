#include "cpu_operands.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/fill.h>

#include <limits>

namespace lorafast::host {

using at::Tensor;

// As lorafast/engine/backends/cpu.py has it, with the reason.
constexpr int64_t ONE_THREAD = 1 << 18;

int type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return static_cast<int>(Type::fp32);
    case at::kBFloat16:
      return static_cast<int>(Type::bf16);
    case at::kHalf:
      return static_cast<int>(Type::fp16);
    default:
      TORCH_CHECK(false, "the kernels compute in fp32, bf16 and fp16, not in ", dtype);
  }
}

Address address(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<Address>(tensor.const_data_ptr()) : 0;
}

Address address_of_output(const Tensor& tensor) {
  return tensor.defined() ? reinterpret_cast<Address>(tensor.mutable_data_ptr()) : 0;
}

int threads(int64_t work) { return work < ONE_THREAD ? 1 : at::get_num_threads(); }

Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor made = at::detail::empty_cpu(sizes, dtype);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    made.fill_(std::numeric_limits<double>::quiet_NaN());
  return made;
}

Tensor dense_rows(const Tensor& x) {
  Tensor x2 = flat(x);
  return x2.stride(1) == 1 || x2.size(1) == 1 ? x2 : x2.contiguous();
}

}  // namespace lorafast::host

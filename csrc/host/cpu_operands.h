// Operands as the kernels of the `cpu` backend take them: addresses, types, layouts and threads.
#pragma once

#include "../cpu/kernels.h"
#include "backend.h"

namespace lorafast::host {

// The kernels' number of a dtype. Throws for one that they do not compute in.
int type_of(at::ScalarType dtype);
inline int type_of(const at::Tensor& tensor) { return type_of(tensor.scalar_type()); }

// The address of the numbers, 0 for a tensor that is undefined.
Address address(const at::Tensor& tensor);
Address address_of_output(const at::Tensor& tensor);
inline Address seed_address(const Drop& drop) { return drop.threshold ? address(drop.seed) : 0; }

// How many threads share so many multiply-adds.
int threads(int64_t work);

// torch.empty without the dispatcher, and as torch's deterministic mode wants it.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// The activation as [M, width]: a view where its strides allow one.
inline at::Tensor flat(const at::Tensor& x) {
  return x.dim() == 2 ? x : x.reshape({tokens(x), x.size(-1)});
}

// flat, dense along its rows.
at::Tensor dense_rows(const at::Tensor& x);

// A gain or a bias as the kernels read it.
inline at::Tensor dense_fp32(const at::Tensor& vector) {
  return vector.defined() ? cast(vector, at::kFloat).contiguous() : vector;
}

inline at::Tensor in_kernel_type(const at::Tensor& factor) {
  return factor.scalar_type() != at::kDouble ? factor : cast(factor, at::kFloat);
}

}  // namespace lorafast::host

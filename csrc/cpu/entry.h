// Conversions from the numbers that Python passes to what the kernels take; the entry points share
// them.
#pragma once

#include "pack.h"
#include "philox.h"

namespace lorafast {

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

// Calls body(T{}) with the activation's element type T.
template <class Body>
auto with_activation_type(int type, Body&& body) {
  switch (static_cast<Type>(type)) {
    case Type::bf16:
      return body(bf16{});
    case Type::fp16:
      return body(fp16{});
    default:
      return body(float{});
  }
}

inline Factor factor(Address data, int type, int64_t R, int64_t length, int64_t stride_R,
                     int64_t stride_length) {
  return {pointer<void>(data), static_cast<Type>(type), R, length, stride_R, stride_length};
}

// seed is the address of one int64. The scale is 1/(1 - p) for p = threshold / 2¹⁶.
inline Dropout dropout(Address seed, uint32_t threshold) {
  if (!threshold) return {};
  return {static_cast<uint64_t>(*pointer<int64_t>(seed)), threshold,
          65536.0f / (65536.0f - threshold)};
}

}  // namespace lorafast

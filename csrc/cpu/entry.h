// What the entries share: numbers from Python, made into what the kernels read.
#pragma once

#include "pack.h"
#include "philox.h"

namespace lorafast {

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// Calls body(T{}) with the activation's type.
template <class Body>
auto of_type(int type, Body&& body) {
  switch (static_cast<Type>(type)) {
    case Type::bf16:
      return body(bf16{});
    case Type::fp16:
      return body(fp16{});
    default:
      return body(float{});
  }
}

inline Factor factor(Address data, int type, int64_t R, int64_t length, int64_t stride_R, int64_t stride_length) {
  return {at<void>(data), static_cast<Type>(type), R, length, stride_R, stride_length};
}

// seed: one int64; t: the 16-bit halves below it are dropped.
inline Dropout dropout(Address seed, uint32_t t) {
  if (!t) return {};
  return {static_cast<uint64_t>(*at<int64_t>(seed)), t, 65536.0f / (65536.0f - t)};
}

}  // namespace lorafast

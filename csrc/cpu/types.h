// Element types, and descriptions of matrices, factors and dropout that all kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lorafast {

// An address as Python passes it.
using Address = uintptr_t;

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// The numbers are those of lorafast/engine/backends/cpu.py.
enum class Type : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// The type of u and v beside an activation of type T. fp16's range is too narrow for them.
template <class T>
struct LowRankGradOf {
  using type = T;
};
template <>
struct LowRankGradOf<fp16> {
  using type = float;
};
template <class T>
using LowRankGrad = typename LowRankGradOf<T>::type;

// A rows × columns matrix with unit stride along a row. stride counts elements.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;

  T* row(int64_t m) const { return data + m * stride; }
};

// A factor [R, length] of any element type and any strides, in elements. It is read in place.
struct Factor {
  const void* data;
  Type type;
  int64_t R, length, stride_R, stride_length;
};

// The dropout of an activation: a 16-bit draw below threshold drops its element, and scale
// multiplies the elements that are kept. A threshold of 0 means no dropout.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1;
  // The rows of the activation that these rows are, where they are not those from `first` on.
  const int64_t* rows = nullptr;
  int64_t first = 0;

  int64_t row(int64_t m) const { return rows ? rows[m] : first + m; }
  explicit operator bool() const { return threshold != 0; }
};

// The largest R of one call. It bounds the buffers on a thread's stack that hold parts of a factor.
constexpr int64_t MAX_RANK = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace lorafast

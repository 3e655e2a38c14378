// The element types a tensor may have, and where a matrix lies.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lorafast {

// An address as Python gives it.
using Address = uintptr_t;

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// As lorafast/backends/cpu.py numbers them.
enum class Type : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// rows × columns with unit stride along a row; stride counts elements.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;

  T* row(int64_t m) const { return data + m * stride; }
};

// R × length of any strides, in elements: a factor as it lies, never copied whole.
struct Factor {
  const void* data;
  Type type;
  int64_t R, length, stride_R, stride_length;
};

// Which elements of an activation are kept. t = 0 keeps all; scale multiplies what is kept.
struct Dropout {
  uint64_t seed = 0;
  uint32_t t = 0;
  float scale = 1;

  explicit operator bool() const { return t != 0; }
};

// The largest R of one call: what a thread lays out of a factor stays on its stack.
constexpr int64_t MAX_RANK = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace lorafast

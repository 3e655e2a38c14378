// A vector of W fp32 lanes for the instruction set this file is compiled for, and all the kernels ask of one.
//
// A cell is 32 bits of an operand: one fp32 number, or, where the processor multiplies bf16 in pairs, two bf16 numbers that
// lie next to each other along the sum. mac<paired> then adds one or two products per lane, in fp32.
#pragma once

#include "types.h"

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#else
#include "vector_scalar.h"
#endif

namespace lorafast {

#ifdef LORAFAST_PAIRS
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;

// Named in branches that are never compiled.
Vector load_pairs(const bf16*, int64_t, const uint8_t*);
Vector load_pairs(const bf16*, const uint8_t*);
Vector pair(Vector, Vector);
void interleave(Vector, Vector, float*);
Vector mac_pairs(Vector, Vector, Vector);
#endif

// Whether an operand of this type is read as pairs.
template <class T>
constexpr bool paired = false;
template <>
inline constexpr bool paired<bf16> = HAS_PAIRS;

// Numbers in a cell.
template <class T>
constexpr int per_cell = paired<T> ? 2 : 1;

template <bool pairs>
inline Vector mac(Vector sum, Vector a, Vector b) {
  if constexpr (pairs)
    return mac_pairs(sum, a, b);
  else
    return fma(a, b, sum);
}

// Cells along a row of `columns` numbers.
template <class T>
constexpr int64_t cells(int64_t columns) {
  return (columns + per_cell<T> - 1) / per_cell<T>;
}

// The first n of W numbers; what is beyond is not touched, and reads as 0.
template <class T>
inline Vector load_some(const T* from, int64_t n) {
  return n >= W ? load(from) : load_first(from, static_cast<int>(n));
}
template <class T>
inline void store_some(T* to, Vector v, int64_t n) {
  if (n >= W)
    store(to, v);
  else
    store_first(to, v, static_cast<int>(n));
}

// How cells are read: all W of them, all but those whose bit is 0, or as many as the row has left, bits or not.
enum class Read { whole, masked, ending };

// W cells of a row that has n numbers more; what is not there is 0.
template <class T, Read how = Read::whole>
inline Vector load_cells(const T* from, int64_t n = 0, const uint8_t* bits = nullptr) {
  if constexpr (how == Read::ending) {
    if constexpr (paired<T>) return load_pairs(from, n, bits);
    const Vector v = load_some(from, n);
    return bits ? keep(v, bits) : v;
  } else if constexpr (how == Read::masked) {
    if constexpr (paired<T>) return load_pairs(from, bits);
    return keep(load(from), bits);
  } else {
    if constexpr (paired<T>) return load(reinterpret_cast<const float*>(from));
    return load(from);
  }
}

}  // namespace lorafast

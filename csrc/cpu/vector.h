// A vector of W fp32 lanes for the instruction set this file is compiled for, and its operations.
//
// A cell is 32 bits of an operand: one fp32 number, or, where the processor multiplies bf16 in
// pairs, two bf16 numbers that are adjacent along the summed axis. mac<paired> adds one or two
// products per lane, in fp32.
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

// Declared for branches that are discarded at compile time; never defined.
Vector load_pairs(const bf16*, int64_t, const uint8_t*);
Vector load_pairs(const bf16*, const uint8_t*);
Vector pair(Vector, Vector);
void interleave(Vector, Vector, float*);
Vector mac_pairs(Vector, Vector, Vector);
#endif

// True if a cell of this type holds a pair.
template <class T>
constexpr bool paired = false;
template <>
inline constexpr bool paired<bf16> = HAS_PAIRS;

// Numbers that a Lookup<T> stores at once: those of 16 bytes, two in a byte, the high half first.
constexpr int LOOKUP_NUMBERS = 32;

// The numbers in a cell.
template <class T>
constexpr int per_cell = paired<T> ? 2 : 1;

// sum + a·b per lane; with pairs, the two products of each lane.
template <bool pairs>
inline Vector mac(Vector sum, Vector a, Vector b) {
  if constexpr (pairs)
    return mac_pairs(sum, a, b);
  else
    return fma(a, b, sum);
}

// The number of cells that `columns` numbers take.
template <class T>
constexpr int64_t cells(int64_t columns) {
  return (columns + per_cell<T> - 1) / per_cell<T>;
}

// The first min(n, W) numbers; the other lanes are 0 and their memory is not read.
template <class T>
inline Vector load_partial(const T* from, int64_t n) {
  return n >= W ? load(from) : load_first(from, static_cast<int>(n));
}
// Stores the first min(n, W) lanes.
template <class T>
inline void store_partial(T* to, Vector v, int64_t n) {
  if (n >= W)
    store(to, v);
  else
    store_first(to, v, static_cast<int>(n));
}

// How a vector of cells is read: all W cells, only the numbers whose bit is 1, or at most as many
// numbers as the row has left (with or without bits).
enum class Read { full, masked, partial };

// W cells of a row that has n numbers left; numbers that are masked or beyond its end are 0.
template <class T, Read how = Read::full>
inline Vector load_cells(const T* from, int64_t n = 0, const uint8_t* bits = nullptr) {
  if constexpr (how == Read::partial) {
    if constexpr (paired<T>) return load_pairs(from, n, bits);
    const Vector v = load_partial(from, n);
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

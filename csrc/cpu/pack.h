// Factors as cells in the order the tiles read them, multiplied in fp32 before their one rounding to T.
#pragma once

#include <cstring>

#include "threads.h"
#include "vector.h"

namespace lorafast {

// What multiplies column l of a factor: s·gain[l]·scale[l], each absent where null.
struct Multiplier {
  float s = 1;
  const float* gain = nullptr;
  const float* scale = nullptr;

  float at(int64_t l) const { return s * (gain ? gain[l] : 1.0f) * (scale ? scale[l] : 1.0f); }
  // Of the n columns from l on, or the first W of them.
  Vector along(int64_t l, int64_t n) const {
    Vector v = splat(s);
    if (gain) v = mul(v, load_some(gain + l, n));
    return scale ? mul(v, load_some(scale + l, n)) : v;
  }
};

// Up to W numbers `step` apart, 0 beyond n.
template <class S>
inline Vector gather(const S* from, int64_t step, int64_t n) {
  if (step == 1) return load_some(from, n);
  S some[W] = {};
  for (int64_t i = 0; i < at_most(n, W); ++i) some[i] = from[i * step];
  return load(some);
}

template <class T>
inline Vector rounded(Vector v) {
  T some[W];
  store(some, v);
  return load(some);
}

// Two numbers per lane, or the one there is, as a cell.
template <class T>
inline Vector cell(Vector a, Vector b) {
  if constexpr (paired<T>)
    return pair(a, b);
  else
    return rounded<T>(a);
}

// Calls body(s) with a pointer of the factor's own type.
template <class Body>
inline void typed(const Factor& f, Body&& body) {
  switch (f.type) {
    case Type::fp32:
      return body(static_cast<const float*>(f.data));
    case Type::bf16:
      return body(static_cast<const bf16*>(f.data));
    case Type::fp16:
      return body(static_cast<const fp16*>(f.data));
  }
}

// Numbers a row of R takes once it is whole vectors.
inline int64_t padded(int64_t n) { return round_up(n, W); }

// Numbers in W cells.
template <class T>
constexpr int64_t SPAN = W * per_cell<T>;

// Floats a factor takes as pack_long lays it.
template <class T>
inline int64_t packed_long(int64_t length, int64_t R) {
  return ceil_div(length, SPAN<T>) * W * round_up(R, DOWN_RANKS);
}

// Inside a team: [R / DOWN_RANKS][length in spans][DOWN_RANKS][W cells along the length], for `project`: what a tile reads is one
// stream.
template <class T>
inline void pack_long(const Factor& f, const Multiplier& by, float* out) {
  const int64_t ranks = round_up(f.R, DOWN_RANKS), span = SPAN<T>, count = ceil_div(f.length, span);
  typed(f, [&](auto* data) {
    each(count, [&](int64_t task) {
      for (int64_t r = 0; r < ranks; ++r) {
        float* to = out + ((r / DOWN_RANKS * count + task) * DOWN_RANKS + r % DOWN_RANKS) * W;
        store(to, zero());
        for (int64_t l = task * span, half = 0; half < per_cell<T> && l < f.length && r < f.R; ++half, l += W) {
          const Vector v =
              mul(gather(data + r * f.stride_R + l * f.stride_length, f.stride_length, f.length - l), by.along(l, f.length - l));
          if constexpr (paired<T>)
            store(reinterpret_cast<T*>(to) + half * W, v);
          else
            store(to, rounded<T>(v));
        }
      }
    });
  });
}

// Columns of `low_rank_add` that one tile takes.
constexpr int64_t WIDE = UP_VECTORS * W;

// Floats a factor takes as pack_wide lays it.
inline int64_t packed_wide(int64_t length, int64_t R) { return R * round_up(length, WIDE); }

// Inside a team: [length / WIDE][cells<T>(R)][WIDE], the sum running along R, for `low_rank_add`: what a tile reads is one stream.
template <class T>
inline void pack_wide(const Factor& f, const Multiplier& by, float* out) {
  constexpr int two = per_cell<T>;
  typed(f, [&](auto* data) {
    each(ceil_div(f.length, WIDE), [&](int64_t task) {
      float* to = out + task * cells<T>(f.R) * WIDE;
      for (int64_t l = task * WIDE, n = 0; n < WIDE; l += W, n += W) {
        if (l >= f.length) {
          for (int64_t r = 0; r < cells<T>(f.R); ++r) store(to + r * WIDE + n, zero());
          continue;
        }
        const Vector multiplier = by.along(l, f.length - l);
        for (int64_t r = 0; r < f.R; r += two) {
          const auto* from = data + r * f.stride_R + l * f.stride_length;
          const Vector a = mul(gather(from, f.stride_length, f.length - l), multiplier);
          const bool both = two == 2 && r + 1 < f.R;
          const Vector b = both ? mul(gather(from + f.stride_R, f.stride_length, f.length - l), multiplier) : zero();
          store(to + r / two * WIDE + n, cell<T>(a, b));
        }
      }
    });
  });
}

}  // namespace lorafast

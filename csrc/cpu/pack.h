// Factors packed as cells in the order in which the tiles read them. A factor is multiplied by its
// column scale in fp32, then rounded to T once.
#pragma once

#include <cstring>

#include "threads.h"
#include "vector.h"

namespace lorafast {

// The multiplier of column l of a factor: s·gain[l]·scale[l], where a null vector counts as ones.
struct ColumnScale {
  float s = 1;
  const float* gain = nullptr;
  const float* scale = nullptr;

  float at(int64_t l) const { return s * (gain ? gain[l] : 1.0f) * (scale ? scale[l] : 1.0f); }
  // The multipliers of the first min(n, W) columns from l on.
  Vector load(int64_t l, int64_t n) const {
    Vector v = broadcast(s);
    if (gain) v = mul(v, load_partial(gain + l, n));
    return scale ? mul(v, load_partial(scale + l, n)) : v;
  }
};

// The first min(n, W) of numbers `step` elements apart; the other lanes are 0.
template <class S>
inline Vector gather(const S* from, int64_t step, int64_t n) {
  if (step == 1) return load_partial(from, n);
  S numbers[W] = {};
  for (int64_t i = 0; i < min(n, W); ++i) numbers[i] = from[i * step];
  return load(numbers);
}

// v rounded to T, as fp32.
template <class T>
inline Vector rounded(Vector v) {
  T numbers[W];
  store(numbers, v);
  return load(numbers);
}

// Cells of two vectors of numbers, or of the first one alone where a cell holds one number.
template <class T>
inline Vector make_cells(Vector a, Vector b) {
  if constexpr (paired<T>)
    return pair(a, b);
  else
    return rounded<T>(a);
}

// Calls body(data) with a pointer of the factor's element type.
template <class Body>
inline void with_factor_data(const Factor& f, Body&& body) {
  switch (f.type) {
    case Type::fp32:
      return body(static_cast<const float*>(f.data));
    case Type::bf16:
      return body(static_cast<const bf16*>(f.data));
    case Type::fp16:
      return body(static_cast<const fp16*>(f.data));
  }
}

// True if the factor holds a number other than 0. The search stops at the first one, so it is short
// except for a factor that has not been trained yet. A number whose square underflows may count as
// 0; the caller then takes another route, which is correct too.
inline bool has_nonzero(const Factor& f) {
  bool found = false;
  with_factor_data(f, [&](auto* data) {
    for (int64_t r = 0; r < f.R && !found; ++r)
      for (int64_t l = 0; l < f.length && !found; l += W) {
        const Vector v =
            gather(data + r * f.stride_R + l * f.stride_length, f.stride_length, f.length - l);
        found = sum_lanes(mul(v, v)) != 0;
      }
  });
  return found;
}

// n rounded up to whole vectors.
inline int64_t padded(int64_t n) { return round_up(n, W); }

// The numbers in W cells: a span.
template <class T>
constexpr int64_t SPAN = W * per_cell<T>;

// The size in floats of a factor packed for `project`.
template <class T>
inline int64_t project_pack_size(int64_t length, int64_t R) {
  return ceil_div(length, SPAN<T>) * W * round_up(R, PROJECT_RANKS);
}

// Called by every thread of a team: packs a factor for `project`, as
// [R / PROJECT_RANKS][length / SPAN][PROJECT_RANKS][W cells along the length]. A tile then reads
// one contiguous stream.
template <class T>
inline void pack_for_project(const Factor& f, const ColumnScale& column_scale, float* out) {
  const int64_t ranks = round_up(f.R, PROJECT_RANKS), span = SPAN<T>,
                count = ceil_div(f.length, span);
  with_factor_data(f, [&](auto* data) {
    parallel_for(count, [&](int64_t task) {
      for (int64_t r = 0; r < ranks; ++r) {
        float* to =
            out + ((r / PROJECT_RANKS * count + task) * PROJECT_RANKS + r % PROJECT_RANKS) * W;
        store(to, zero());
        for (int64_t l = task * span, half = 0; half < per_cell<T> && l < f.length && r < f.R;
             ++half, l += W) {
          const Vector v = mul(
              gather(data + r * f.stride_R + l * f.stride_length, f.stride_length, f.length - l),
              column_scale.load(l, f.length - l));
          if constexpr (paired<T>)
            store(reinterpret_cast<T*>(to) + half * W, v);
          else
            store(to, rounded<T>(v));
        }
      }
    });
  });
}

// W columns of a factor from column l on, whose rows are asked for in turn. Where a row is not
// dense, several are transposed before the first is loaded: a load of numbers that were stored one
// by one just before waits until the last of them has left the store buffer.
template <class S>
class Columns {
 public:
  Columns(const Factor& f, const S* data, int64_t l)
      : f(f), from(data + l * f.stride_length), count(min(f.length - l, W)) {}

  Vector at(int64_t r) {
    if (f.stride_length == 1) return load_partial(from + r * f.stride_R, count);
    if (r % AT_ONCE == 0)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < min(AT_ONCE, f.R - r); ++j)
          numbers[j][i] = from[i * f.stride_length + (r + j) * f.stride_R];
    return load(numbers[r % AT_ONCE]);
  }

 private:
  static constexpr int64_t AT_ONCE = 8;

  const Factor& f;
  const S* const from;
  const int64_t count;
  S numbers[AT_ONCE][W] = {};
};

// The columns of one tile of `low_rank_add`.
constexpr int64_t LOW_RANK_ADD_COLUMNS = LOW_RANK_ADD_VECTORS * W;

// The size in floats of a factor packed for `low_rank_add`.
inline int64_t low_rank_add_pack_size(int64_t length, int64_t R) {
  return R * round_up(length, LOW_RANK_ADD_COLUMNS);
}

// Called by every thread of a team: packs a factor for `low_rank_add`, which sums along R, as
// [length / LOW_RANK_ADD_COLUMNS][cells<T>(R)][LOW_RANK_ADD_COLUMNS]. A tile then reads one
// contiguous stream.
template <class T>
inline void pack_for_low_rank_add(const Factor& f, const ColumnScale& column_scale, float* out) {
  constexpr int step = per_cell<T>;
  with_factor_data(f, [&](auto* data) {
    parallel_for(ceil_div(f.length, LOW_RANK_ADD_COLUMNS), [&](int64_t task) {
      float* to = out + task * cells<T>(f.R) * LOW_RANK_ADD_COLUMNS;
      for (int64_t l = task * LOW_RANK_ADD_COLUMNS, n = 0; n < LOW_RANK_ADD_COLUMNS;
           l += W, n += W) {
        if (l >= f.length) {
          for (int64_t r = 0; r < cells<T>(f.R); ++r)
            store(to + r * LOW_RANK_ADD_COLUMNS + n, zero());
          continue;
        }
        const Vector multiplier = column_scale.load(l, f.length - l);
        Columns columns(f, data, l);
        for (int64_t r = 0; r < f.R; r += step) {
          const Vector a = mul(columns.at(r), multiplier);
          const Vector b = step == 2 && r + 1 < f.R ? mul(columns.at(r + 1), multiplier) : zero();
          store(to + r / step * LOW_RANK_ADD_COLUMNS + n, make_cells<T>(a, b));
        }
      }
    });
  });
}

}  // namespace lorafast

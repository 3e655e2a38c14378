// gain⊙x, each number rounded once.
#pragma once

#include "threads.h"
#include "vector.h"

namespace lorafast {

constexpr int64_t SCALE_ROWS = 16;

// gain: one per row, or one per column. out [rows, columns], dense.
template <class T>
void scale(const Matrix<const T>& x, const float* gain, bool by_row, T* out, int threads) {
  team(threads, [&] {
    each(ceil_div(x.rows, SCALE_ROWS), [&](int64_t task) {
      for (int64_t m = task * SCALE_ROWS; m < at_most((task + 1) * SCALE_ROWS, x.rows); ++m) {
        const T* from = x.row(m);
        T* to = out + m * x.columns;
        const Vector one = by_row ? splat(gain[m]) : zero();
        int64_t k = 0;
        for (; k + W <= x.columns; k += W) store(to + k, mul(load(from + k), by_row ? one : load(gain + k)));
        if (const int64_t n = x.columns - k)
          store_some(to + k, mul(load_some(from + k, n), by_row ? one : load_some(gain + k, n)), n);
      }
    });
  });
}

}  // namespace lorafast

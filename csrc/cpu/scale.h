// scale: gain⊙x, each number rounded once.
#pragma once

#include "threads.h"
#include "vector.h"

namespace lorafast {

constexpr int64_t SCALE_ROWS = 16;

// gain: [rows] (by_row) or [columns]. out [rows, columns], contiguous.
template <class T>
void scale(const Matrix<const T>& x, const float* gain, bool by_row, T* out, int threads) {
  parallel(threads, [&] {
    parallel_for(ceil_div(x.rows, SCALE_ROWS), [&](int64_t task) {
      for (int64_t m = task * SCALE_ROWS; m < min((task + 1) * SCALE_ROWS, x.rows); ++m) {
        const T* from = x.row(m);
        T* to = out + m * x.columns;
        const Vector row_gain = by_row ? broadcast(gain[m]) : zero();
        int64_t k = 0;
        for (; k + W <= x.columns; k += W)
          store(to + k, mul(load(from + k), by_row ? row_gain : load(gain + k)));
        if (const int64_t n = x.columns - k)
          store_partial(
              to + k, mul(load_partial(from + k, n), by_row ? row_gain : load_partial(gain + k, n)),
              n);
      }
    });
  });
}

}  // namespace lorafast

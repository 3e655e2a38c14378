// drop: drop(x), each number multiplied in fp32 and rounded once.
#pragma once

#include "philox.h"
#include "threads.h"
#include "vector.h"

namespace lorafast {

constexpr int64_t DROP_ROWS = 16, DROP_COLUMNS = 1024;

// x holds rows m0, m0 + 1, … of an activation, which give the counters of the dropout bits.
// out [rows, columns], contiguous.
template <class T>
void drop(const Matrix<const T>& x, const Dropout& dropout, int64_t m0, T* out, int threads) {
  const Vector scale = broadcast(dropout.scale);
  parallel(threads, [&] {
    parallel_for(ceil_div(x.rows, DROP_ROWS), [&](int64_t task) {
      uint8_t bits[DROP_COLUMNS / 8 + PHILOX_SLACK];
      for (int64_t m = task * DROP_ROWS; m < min((task + 1) * DROP_ROWS, x.rows); ++m)
        for (int64_t k0 = 0; k0 < x.columns; k0 += DROP_COLUMNS) {
          const int64_t columns = min(DROP_COLUMNS, x.columns - k0);
          const T* from = x.row(m) + k0;
          T* to = out + m * x.columns + k0;
          keep_tile(dropout, x.columns, m0 + m, 1, k0, columns, bits, 0);
          for (int64_t k = 0; k < columns; k += W)
            store_partial(to + k,
                          mul(keep(load_partial(from + k, columns - k), bits + k / 8), scale),
                          columns - k);
        }
    });
  });
}

// out [rows, columns], contiguous: 1 for every element that drop drops, 0 for the others.
inline void drop_mask(int64_t rows, int64_t columns, const Dropout& dropout, uint8_t* out) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k0 = 0; k0 < columns; k0 += DROP_COLUMNS) {
      uint8_t bits[DROP_COLUMNS / 8 + PHILOX_SLACK];
      const int64_t count = min(DROP_COLUMNS, columns - k0);
      keep_tile(dropout, columns, m, 1, k0, count, bits, 0);
      uint8_t* to = out + m * columns + k0;
      for (int64_t k = 0; k < count; ++k) to[k] = ~bits[k / 8] >> k % 8 & 1;
    }
}

}  // namespace lorafast

// out = gain⊙(out + mask⊙(h F)) + bias: a short sum under every element, added to a finished GEMM in one pass.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// What becomes of a sum: added as it is, masked and then added, or multiplied by the gain.
enum class End { plain, masked, gained };

// gain and bias [N] or null; inner [M,N]: where the sum goes before them, or null.
template <class T>
struct Gain {
  const float* gain = nullptr;
  const float* bias = nullptr;
  Matrix<T> inner{};
};

constexpr int64_t UP_TASK_ROWS = 8 * UP_ROWS, UP_TASK_COLUMNS = 1024;

// One task of `low_rank_add`: some rows and columns of out.
template <class T, End end>
class UpTask {
 public:
  UpTask(const Matrix<T>& out, const Gain<T>& gain, const Dropout& drop, const float* packed, int64_t R)
      : out(out), gain(gain), drop(drop), packed(packed), R(R), scale(splat(drop.scale)) {}

  void operator()(const Matrix<const T>& h, int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
    const int64_t Rp = padded(R);
    stage_rows(h, m0, rows, R, staged, Rp);
    if (end == End::masked) keep_tile(drop, out.columns, m0, rows, n0, columns, bits, BITS_ROW);
    by_rows<UP_ROWS>(rows, [&](auto rows_of, int64_t i) {
      constexpr int I = decltype(rows_of)::value;
      for (int64_t n = 0; n < columns; n += WIDE) {
        Vector sums[I][UP_VECTORS];
        clear(sums);
        multiply<paired<T>>(staged + i * Rp, Rp, 1, packed + (n0 + n) * cells<T>(R), WIDE, cells<T>(R), sums);
        const bool whole = n + WIDE <= columns;
#pragma GCC unroll 12
        for (int ii = 0; ii < I; ++ii) {
          T* to = out.row(m0 + i + ii) + n0 + n;
          // The lines of the next tile, by the time it comes to them.
          for (int64_t line = 0; line < WIDE; line += 64 / sizeof(T)) __builtin_prefetch(to + I * out.stride + line, 1);
          const uint8_t* kept = bits + (i + ii) * BITS_ROW + n / 8;
          if (whole)
#pragma GCC unroll 4
            for (int j = 0; j < UP_VECTORS; ++j)
              finish<true>(sums[ii][j], to + j * W, kept + j * W / 8, m0 + i + ii, n0 + n + j * W, W);
          else
            for (int j = 0; j < UP_VECTORS && n + j * W < columns; ++j)
              finish<false>(sums[ii][j], to + j * W, kept + j * W / 8, m0 + i + ii, n0 + n + j * W, columns - n - j * W);
        }
      }
    });
  }

 private:
  static constexpr int64_t BITS_ROW = UP_TASK_COLUMNS / 8;

  template <bool whole, class S>
  static Vector read(const S* from, int64_t n) {
    return whole ? load(from) : load_some(from, n);
  }
  template <bool whole>
  static void write(T* to, Vector v, int64_t n) {
    if (whole)
      store(to, v);
    else
      store_some(to, v, n);
  }

  // The first n of W columns from column at of row m.
  template <bool whole>
  void finish(Vector sum, T* to, const uint8_t* kept, int64_t m, int64_t at, int64_t n) const {
    if (end == End::masked)
      sum = fma(keep(sum, kept), scale, read<whole>(to, n));
    else
      sum = add(read<whole>(to, n), sum);
    if (end == End::gained) {
      if (gain.inner.data) write<whole>(gain.inner.row(m) + at, sum, n);
      sum = fma(sum, read<whole>(gain.gain + at, n), gain.bias ? read<whole>(gain.bias + at, n) : zero());
    }
    write<whole>(to, sum, n);
  }

  const Matrix<T>& out;
  const Gain<T>& gain;
  const Dropout& drop;
  const float* packed;
  const int64_t R;
  const Vector scale;
  alignas(64) float staged[UP_TASK_ROWS * MAX_RANK];
  alignas(64) uint8_t bits[UP_TASK_ROWS * BITS_ROW + PHILOX_SLACK];
};

// h [M,R], F [R,N] multiplied by `by` and rounded to T, out [M,N] holding the base's part.
template <class T, End end>
void up_to(const Matrix<const T>& h, const Factor& F, const Multiplier& by, const Dropout& drop, const Gain<T>& gain,
           const Matrix<T>& out, int threads) {
  const int64_t across = ceil_div(out.columns, UP_TASK_COLUMNS);
  const Workspace work(packed_wide(out.columns, F.R));
  team(threads, [&] {
    pack_wide<T>(F, by, work);
    each(across * ceil_div(out.rows, UP_TASK_ROWS), [&](int64_t task) {
      const int64_t m0 = task / across * UP_TASK_ROWS, n0 = task % across * UP_TASK_COLUMNS;
      UpTask<T, end> part(out, gain, drop, work, F.R);
      part(h, m0, at_most(UP_TASK_ROWS, out.rows - m0), n0, at_most(UP_TASK_COLUMNS, out.columns - n0));
    });
  });
}

// drop and gain exclude each other.
template <class T>
void low_rank_add(const Matrix<const T>& h, const Factor& F, const Multiplier& by, const Dropout& drop, const Gain<T>& gain,
        const Matrix<T>& out, int threads) {
  if (drop)
    up_to<T, End::masked>(h, F, by, drop, gain, out, threads);
  else if (gain.gain)
    up_to<T, End::gained>(h, F, by, drop, gain, out, threads);
  else
    up_to<T, End::plain>(h, F, by, drop, gain, out, threads);
}

}  // namespace lorafast

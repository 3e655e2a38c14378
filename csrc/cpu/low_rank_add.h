// low_rank_add: out = gain⊙(out + mask⊙(h F)) + bias, a sum over R for every element, added to the
// result of a GEMM in one pass.
#pragma once

#include "pack.h"
#include "stage.h"
#include "tile.h"
#include "workspace.h"

namespace lorafast {

// What happens to a low-rank sum: it is added to out; it is masked and scaled, then added; or it is
// added and the total multiplied by the gain.
enum class Epilogue { add, dropout, gain };

// gain and bias [N], or null. inner [M,N] receives the total before gain and bias, or is null.
template <class T>
struct GainArguments {
  const float* gain = nullptr;
  const float* bias = nullptr;
  Matrix<T> inner{};
};

// The most rows for which a factor is not packed: to transpose it takes as long as some rows do.
constexpr int64_t FEW_ROWS = 4;
constexpr int64_t LOW_RANK_ADD_TASK_ROWS = 8 * LOW_RANK_ADD_ROWS, LOW_RANK_ADD_TASK_COLUMNS = 1024;

// One task of `low_rank_add`: a block of rows and columns of out. H is the type of h.
template <class T, class H, Epilogue epilogue>
class LowRankAddTask {
 public:
  LowRankAddTask(const Matrix<T>& out, const GainArguments<T>& gain_arguments, const Dropout& drop,
                 const float* packed, int64_t R)
      : out(out),
        gain_arguments(gain_arguments),
        drop(drop),
        packed(packed),
        R(R),
        scale(broadcast(drop.scale)) {}

  void operator()(const Matrix<const H>& h, int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
    const int64_t Rp = padded(R);
    stage_rows(h, m0, rows, R, h_cells, Rp);
    if (epilogue == Epilogue::dropout)
      keep_tile(drop, out.columns, m0, rows, n0, columns, bits, BITS_ROW);
    for_row_tiles<LOW_RANK_ADD_ROWS>(rows, [&](auto rows_of, int64_t i) {
      constexpr int I = decltype(rows_of)::value;
      for (int64_t n = 0; n < columns; n += LOW_RANK_ADD_COLUMNS) {
        Vector sums[I][LOW_RANK_ADD_VECTORS];
        clear(sums);
        multiply_broadcast<paired<H>>(h_cells + i * Rp, Rp, 1, packed + (n0 + n) * cells<H>(R),
                                      LOW_RANK_ADD_COLUMNS, cells<H>(R), sums);
        if (n + LOW_RANK_ADD_COLUMNS > columns) {
          // Through memory, in loops that are not unrolled: they are compiled in a tenth of the
          // time, and run once a row.
          alignas(64) float parts[I][LOW_RANK_ADD_COLUMNS];
#pragma GCC unroll 12
          for (int ii = 0; ii < I; ++ii)
#pragma GCC unroll 4
            for (int j = 0; j < LOW_RANK_ADD_VECTORS; ++j) store(&parts[ii][j * W], sums[ii][j]);
          finish_partial(parts[0], m0 + i, I, bits + i * BITS_ROW + n / 8, n0 + n, columns - n);
          continue;
        }
#pragma GCC unroll 12
        for (int ii = 0; ii < I; ++ii) {
          T* to = out.row(m0 + i + ii) + n0 + n;
          // Prefetches the cache lines of the next tile's rows, for writing.
          for (int64_t line = 0; line < LOW_RANK_ADD_COLUMNS; line += 64 / sizeof(T))
            __builtin_prefetch(to + I * out.stride + line, 1);
          const uint8_t* kept = bits + (i + ii) * BITS_ROW + n / 8;
#pragma GCC unroll 4
          for (int j = 0; j < LOW_RANK_ADD_VECTORS; ++j)
            finish<true>(sums[ii][j], to + j * W, kept + j * W / 8, m0 + i + ii, n0 + n + j * W, W);
        }
      }
    });
  }

 private:
  static constexpr int64_t BITS_ROW = LOW_RANK_ADD_TASK_COLUMNS / 8;

  template <bool full, class S>
  static Vector read(const S* from, int64_t n) {
    return full ? load(from) : load_partial(from, n);
  }
  template <bool full>
  static void write(T* to, Vector v, int64_t n) {
    if (full)
      store(to, v);
    else
      store_partial(to, v, n);
  }

  // Combines a sum with the first n of W numbers at `to`, as the epilogue says. They are in row m
  // and start at column `column`.
  template <bool full>
  void finish(Vector sum, T* to, const uint8_t* kept, int64_t m, int64_t column, int64_t n) const {
    if (epilogue == Epilogue::dropout)
      sum = fma(keep(sum, kept), scale, read<full>(to, n));
    else
      sum = add(read<full>(to, n), sum);
    if (epilogue == Epilogue::gain) {
      if (gain_arguments.inner.data) write<full>(gain_arguments.inner.row(m) + column, sum, n);
      sum = fma(sum, read<full>(gain_arguments.gain + column, n),
                gain_arguments.bias ? read<full>(gain_arguments.bias + column, n) : zero());
    }
    write<full>(to, sum, n);
  }

  // finish for `rows` rows of sums, [rows][LOW_RANK_ADD_COLUMNS], of which `columns` are inside.
  __attribute__((noinline)) void finish_partial(const float* sums, int64_t m, int rows,
                                                const uint8_t* kept, int64_t column,
                                                int64_t columns) const {
#pragma GCC unroll 1
    for (int i = 0; i < rows; ++i, sums += LOW_RANK_ADD_COLUMNS, kept += BITS_ROW)
#pragma GCC unroll 1
      for (int64_t n = 0; n < columns; n += W)
        finish<false>(load(sums + n), out.row(m + i) + column + n, kept + n / 8, m + i, column + n,
                      columns - n);
  }

  const Matrix<T>& out;
  const GainArguments<T>& gain_arguments;
  const Dropout& drop;
  const float* packed;
  const int64_t R;
  const Vector scale;
  alignas(64) float h_cells[LOW_RANK_ADD_TASK_ROWS * MAX_RANK];
  alignas(64) uint8_t bits[LOW_RANK_ADD_TASK_ROWS * BITS_ROW + PHILOX_SLACK];
};

// low_rank_add with one epilogue. h [M,R]; F [R,N], multiplied by column_scale and rounded to H;
// out [M,N], which holds the base term.
template <class T, class H, Epilogue epilogue>
void low_rank_add_as(const Matrix<const H>& h, const Factor& F, const ColumnScale& column_scale,
                     const Dropout& drop, const GainArguments<T>& gain_arguments,
                     const Matrix<T>& out, int threads) {
  const int64_t across = ceil_div(out.columns, LOW_RANK_ADD_TASK_COLUMNS);
  const Workspace work(low_rank_add_pack_size(out.columns, F.R));
  parallel(threads, [&] {
    pack_for_low_rank_add<H>(F, column_scale, work);
    parallel_for(across * ceil_div(out.rows, LOW_RANK_ADD_TASK_ROWS), [&](int64_t task) {
      const int64_t m0 = task / across * LOW_RANK_ADD_TASK_ROWS,
                    n0 = task % across * LOW_RANK_ADD_TASK_COLUMNS;
      LowRankAddTask<T, H, epilogue> add_block(out, gain_arguments, drop, work, F.R);
      add_block(h, m0, min(LOW_RANK_ADD_TASK_ROWS, out.rows - m0), n0,
                min(LOW_RANK_ADD_TASK_COLUMNS, out.columns - n0));
    });
  });
}

// low_rank_add of few rows in fp32, without dropout, by a factor whose ranks lie side by side: each
// number is a product along its row of the factor, which is read once and not packed.
inline void add_few_rows(const Matrix<const float>& h, const Factor& F,
                         const ColumnScale& column_scale, const GainArguments<float>& gained,
                         const Matrix<float>& out, int threads) {
  constexpr int64_t COLUMNS = 256, TOGETHER = 4;
  const auto* factor = static_cast<const float*>(F.data);
  const auto dot = [&](const float* a, int64_t n) {
    Vector sum = zero();
    for (int64_t r = 0; r < F.R; r += W)
      sum = fma(load_partial(a + r, F.R - r),
                load_partial(factor + n * F.stride_length + r, F.R - r), sum);
    return sum;
  };
  parallel(threads, [&] {
    parallel_for(ceil_div(out.columns, COLUMNS), [&](int64_t task) {
      const int64_t n0 = task * COLUMNS, columns = min(COLUMNS, out.columns - n0);
      for (int64_t m = 0; m < out.rows; ++m) {
        const float* a = h.row(m);
        alignas(64) float sums[COLUMNS + W] = {};
        int64_t n = 0;
        for (; n + TOGETHER <= columns; n += TOGETHER)
          add_lane_sums(dot(a, n0 + n), dot(a, n0 + n + 1), dot(a, n0 + n + 2), dot(a, n0 + n + 3),
                        sums + n);
        for (; n < columns; ++n) sums[n] = sum_lanes(dot(a, n0 + n));
        for (n = 0; n < columns; n += W) {
          const int64_t column = n0 + n, left = columns - n;
          float* to = out.row(m) + column;
          Vector total =
              fma(load(sums + n), column_scale.load(column, left), load_partial(to, left));
          if (gained.gain) {
            if (gained.inner.data) store_partial(gained.inner.row(m) + column, total, left);
            total = fma(total, load_partial(gained.gain + column, left),
                        gained.bias ? load_partial(gained.bias + column, left) : zero());
          }
          store_partial(to, total, left);
        }
      }
    });
  });
}

// Picks the epilogue. drop and a gain exclude each other.
template <class T, class H>
void low_rank_add(const Matrix<const H>& h, const Factor& F, const ColumnScale& column_scale,
                  const Dropout& drop, const GainArguments<T>& gain_arguments, const Matrix<T>& out,
                  int threads) {
  if constexpr (std::is_same_v<T, float>) {
    const bool as_it_lies = F.type == Type::fp32 && F.stride_R == 1;
    if (as_it_lies && !drop && out.rows <= FEW_ROWS)
      return add_few_rows(h, F, column_scale, gain_arguments, out, threads);
  }
  if (drop)
    low_rank_add_as<T, H, Epilogue::dropout>(h, F, column_scale, drop, gain_arguments, out,
                                             threads);
  else if (gain_arguments.gain)
    low_rank_add_as<T, H, Epilogue::gain>(h, F, column_scale, drop, gain_arguments, out, threads);
  else
    low_rank_add_as<T, H, Epilogue::add>(h, F, column_scale, drop, gain_arguments, out, threads);
}

}  // namespace lorafast

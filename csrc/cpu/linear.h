// linear: y = gain⊙(x Wᵀ + h F) + bias, with W read as it lies in memory, once for every 32 tokens.
#pragma once

#include "low_rank_add.h"

namespace lorafast {

// Rows of W that are multiplied together, and rows of one task: what it reads of W stays in the L2
// cache for all tokens.
constexpr int LINEAR_ROWS = 4;
constexpr int64_t LINEAR_TASK_ROWS = 32;
// The tokens whose sums a task keeps, and the cells of a row that it multiplies before it goes on
// to the next rows, so that both operands of a tile stay in the L1 cache.
constexpr int64_t LINEAR_TOKENS = 32;
constexpr int64_t LINEAR_CELLS = 1024;

// One task of `linear`: a block of rows of W for all tokens. F may be absent (R = 0).
template <class T>
class LinearTask {
 public:
  LinearTask(const Matrix<const T>& x, const Matrix<const T>& weight, const Matrix<const T>& h,
             const Factor& F, const ColumnScale& column_scale, const GainArguments<T>& gained,
             const Matrix<T>& out)
      : x(x),
        weight(weight),
        h(h),
        F(F),
        column_scale(column_scale),
        gained(gained),
        out(out),
        Rp(padded(F.R)) {}

  // Columns n0 .. n0+columns of out.
  void operator()(int64_t n0, int64_t columns) {
    for (int64_t m0 = 0; m0 < x.rows; m0 += LINEAR_TOKENS) {
      const int64_t tokens = min(LINEAR_TOKENS, x.rows - m0);
      for (int64_t m = 0; m < tokens; ++m) std::memset(sums[m], 0, sizeof(float) * padded(columns));
      for (int64_t k0 = 0; k0 < x.columns; k0 += LINEAR_CELLS * per_cell<T>)
        add_products(m0, tokens, n0, columns, k0);
      if (F.R) add_low_rank(m0, tokens, n0, columns);
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t n = 0; n < columns; n += W) finish(m0 + m, n0 + n, columns - n, sums[m] + n);
    }
  }

 private:
  // sums += the products of the columns of W and x from k0 on.
  void add_products(int64_t m0, int64_t tokens, int64_t n0, int64_t columns, int64_t k0) {
    const int64_t length = min(LINEAR_CELLS * per_cell<T>, x.columns - k0);
    // Tiles of as equal numbers of tokens as can be.
    const int64_t tiles = ceil_div(tokens, LINEAR_TILE);
    for (int64_t n = 0; n < columns; n += LINEAR_ROWS) {
      const T* rows = weight.row(n0 + n) + k0;
      for (int64_t tile = 0, m = 0; tile < tiles; ++tile) {
        const int64_t count = ceil_div(tokens - m, tiles - tile);
        if (columns - n >= LINEAR_ROWS)
          multiply<LINEAR_ROWS>(count, m, x.row(m0 + m) + k0, rows, length, n);
        else
          for (int64_t j = n; j < columns; ++j)
            multiply<1>(count, m, x.row(m0 + m) + k0, weight.row(n0 + j) + k0, length, j);
        m += count;
      }
    }
  }

  // add_products for J rows of W, and `count` tokens.
  template <int J, int I = LINEAR_TILE>
  void multiply(int64_t count, int64_t m, const T* tokens, const T* rows, int64_t length,
                int64_t n) {
    if constexpr (I > 1)
      if (count < I) return multiply<J, I - 1>(count, m, tokens, rows, length, n);
    const int64_t full = length / SPAN<T> * SPAN<T>;
    Vector tile[I][J];
    clear(tile);
    for (int64_t k = 0; k < full; k += SPAN<T>)
      step<Read::full>(tokens + k, rows + k, SPAN<T>, tile);
    if (full < length) step<Read::partial>(tokens + full, rows + full, length - full, tile);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i)
      if constexpr (J == 4)
        add_lane_sums(tile[i][0], tile[i][1], tile[i][2], tile[i][3], sums[m + i] + n);
      else
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sums[m + i][n + j] += sum_lanes(tile[i][j]);
  }

  // Adds the products of the first min(n, SPAN) columns.
  template <Read how, int I, int J>
  inline __attribute__((always_inline)) void step(const T* tokens, const T* rows, int64_t n,
                                                  Vector (&tile)[I][J]) const {
    Vector row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = load_cells<T, how>(rows + j * weight.stride, n);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vector token = load_cells<T, how>(tokens + i * x.stride, n);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) tile[i][j] = mac<paired<T>>(tile[i][j], token, row[j]);
    }
  }

  // sums += h F, F multiplied by its scale.
  void add_low_rank(int64_t m0, int64_t tokens, int64_t n0, int64_t columns) {
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t r = 0; r < F.R; r += W)
        store(low_rank[m] + r, load_partial(h.row(m0 + m) + r, F.R - r));
    with_factor_data(F, [&](auto* data) {
      for (int64_t n = 0; n < columns; ++n) {
        const auto* from = data + (n0 + n) * F.stride_length;
        const Vector multiplier = broadcast(column_scale.at(n0 + n));
        for (int64_t r = 0; r < F.R; r += W)
          store(factor + r, mul(gather(from + r * F.stride_R, F.stride_R, F.R - r), multiplier));
        for (int64_t m = 0; m < tokens; ++m) {
          Vector sum = zero();
          for (int64_t r = 0; r < F.R; r += W)
            sum = fma(load(low_rank[m] + r), load(factor + r), sum);
          sums[m][n] += sum_lanes(sum);
        }
      }
    });
  }

  // Writes the first min(left, W) numbers of row m of out from column n on.
  void finish(int64_t m, int64_t n, int64_t left, const float* from) const {
    Vector total = load(from);
    const Vector bias = gained.bias ? load_partial(gained.bias + n, left) : zero();
    if (gained.inner.data) store_partial(gained.inner.row(m) + n, total, left);
    total = gained.gain ? fma(total, load_partial(gained.gain + n, left), bias) : add(total, bias);
    store_partial(out.row(m) + n, total, left);
  }

  const Matrix<const T>& x;
  const Matrix<const T>& weight;
  const Matrix<const T>& h;
  const Factor& F;
  const ColumnScale& column_scale;
  const GainArguments<T>& gained;
  const Matrix<T>& out;
  const int64_t Rp;
  alignas(64) float sums[LINEAR_TOKENS][LINEAR_TASK_ROWS + W];
  alignas(64) float low_rank[LINEAR_TOKENS][MAX_RANK];
  alignas(64) float factor[MAX_RANK];
};

// True if h F adds something to y: an adapter at its start adds nothing.
template <class T>
inline bool adds(Type type, const Matrix<const T>& h, const Factor& F,
                 const ColumnScale& column_scale) {
  const auto holds = [](const void* data, Type of, int64_t rows, int64_t columns, int64_t stride) {
    return has_nonzero({data, of, rows, columns, stride, 1});
  };
  return column_scale.s != 0 && has_nonzero(F) &&
         holds(h.data, type, h.rows, h.columns, h.stride) &&
         (!column_scale.scale || holds(column_scale.scale, Type::fp32, 1, F.length, F.length));
}

// x [M,K], weight [N,K], h [M,R], F [R,N], out [M,N]. Every number is summed in an order of its
// own, whatever M and the number of threads are.
template <class T>
void linear(const Matrix<const T>& x, const Matrix<const T>& weight, const Matrix<const T>& h,
            const Factor& F, const ColumnScale& column_scale, const GainArguments<T>& gained,
            const Matrix<T>& out, int threads) {
  // On many threads the tasks are smaller, so that each has one.
  const int64_t share = round_up(ceil_div(weight.rows, threads), LINEAR_ROWS),
                step = max(LINEAR_ROWS, min(LINEAR_TASK_ROWS, share));
  parallel(threads, [&] {
    LinearTask<T> task(x, weight, h, F, column_scale, gained, out);
    parallel_for(ceil_div(weight.rows, step),
                 [&](int64_t i) { task(i * step, min(step, weight.rows - i * step)); });
  });
}

}  // namespace lorafast

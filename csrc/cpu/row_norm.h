// row_norm: ‖W + sBA‖ along rows or columns, in one pass over W. W + sBA exists in registers only.
#pragma once

#include <cmath>

#include "grad_project.h"

namespace lorafast {

// V = W + BA, computed in tiles and passed on for a sum of squares per row or per column.
template <class T>
class NormTile {
 public:
  NormTile(const Matrix<const T>& weight, const float* A, int64_t R_cells)
      : weight(weight), A(A), R_cells(R_cells) {}

  // Calls gather(i, k, V[n0 + i, k : k+W]) for i < rows and k0 <= k < k1. B: rows n0 ..
  // n0+rows of the factor, as cells [rows][B_row].
  template <class Gather>
  void operator()(const float* B, int64_t B_row, int64_t n0, int64_t rows, int64_t k0, int64_t k1,
                  Gather&& gather) const {
    for_row_tiles<LOW_RANK_ADD_ROWS>(rows, [&](auto rows_of, int64_t i) {
      constexpr int I = decltype(rows_of)::value;
      for (int64_t k = k0; k < k1; k += LOW_RANK_ADD_COLUMNS) {
        Vector sums[I][LOW_RANK_ADD_VECTORS];
        clear(sums);
        multiply_broadcast<paired<T>>(B + i * B_row, B_row, 1, A + k * R_cells,
                                      LOW_RANK_ADD_COLUMNS, R_cells, sums);
        if (k + LOW_RANK_ADD_COLUMNS <= k1) {
#pragma GCC unroll 12
          for (int ii = 0; ii < I; ++ii)
#pragma GCC unroll 4
            for (int j = 0; j < LOW_RANK_ADD_VECTORS; ++j) {
              const int64_t column = k + j * W;
              gather(i + ii, column, add(load(weight.row(n0 + i + ii) + column), sums[ii][j]));
            }
          continue;
        }
        for (int j = 0; k + j * W < k1; ++j)
          for (int ii = 0; ii < I; ++ii) {
            const int64_t column = k + j * W;
            const Vector w =
                load_partial(weight.row(n0 + i + ii) + column, weight.columns - column);
            gather(i + ii, column, add(w, sums[ii][j]));
          }
      }
    });
  }

 private:
  const Matrix<const T>& weight;
  const float* A;
  int64_t R_cells;
};

// Rows n0 .. n0+rows of s·B as cells along R, multiplied in fp32 and rounded to T.
template <class T>
inline void stage_factor(const Factor& B, float s, int64_t n0, int64_t rows, float* to,
                         int64_t stride) {
  with_factor_data(B, [&](auto* data) {
    for (int64_t i = 0; i < rows; ++i) {
      const auto* from = data + (n0 + i) * B.stride_length;
      T numbers[MAX_RANK];
      for (int64_t r = 0; r < B.R; r += W)
        store(numbers + r, mul(gather(from + r * B.stride_R, B.stride_R, B.R - r), broadcast(s)));
      stage_rows<T>({numbers, 1, B.R, 0}, 0, 1, B.R, to + i * stride, 0);
    }
  });
}

// weight [N,K], A [R,K], B a Factor [R,N], out [N] (by_row) or [K].
template <class T>
void row_norm(const Matrix<const T>& weight, const Factor& A, const Factor& B, float s, bool by_row,
              float* out, int threads) {
  const int64_t N = weight.rows, K = weight.columns, Kp = padded(K), Rp = padded(A.R);
  const Partition partition(N, K, STAGED_COLUMNS);
  const Workspace work(low_rank_add_pack_size(K, A.R) + (by_row ? 0 : partition.splits * Kp));
  const NormTile<T> tile(weight, work, cells<T>(A.R));
  float* sums = work + low_rank_add_pack_size(K, A.R);
  parallel(threads, [&] {
    pack_for_low_rank_add<T>(A, {}, work);
    if (by_row)
      parallel_for(ceil_div(N, LOW_RANK_ADD_ROWS), [&](int64_t task) {
        const int64_t n0 = task * LOW_RANK_ADD_ROWS, rows = min(LOW_RANK_ADD_ROWS, N - n0);
        alignas(64) float B_cells[LOW_RANK_ADD_ROWS * MAX_RANK];
        Vector squares[LOW_RANK_ADD_ROWS];
        for (auto& square : squares) square = zero();
        stage_factor<T>(B, s, n0, rows, B_cells, Rp);
        tile(B_cells, Rp, n0, rows, 0, K,
             [&](int64_t i, int64_t, Vector v) { squares[i] = fma(v, v, squares[i]); });
        for (int64_t i = 0; i < rows; ++i) out[n0 + i] = std::sqrt(sum_lanes(squares[i]));
      });
    else {
      parallel_for(partition.splits * partition.groups, [&](int64_t task) {
        const int64_t split = task / partition.groups, end = min((split + 1) * partition.rows, N);
        const int64_t k0 = task % partition.groups * partition.columns,
                      k1 = min(k0 + partition.columns, K);
        alignas(64) float B_cells[LOW_RANK_ADD_ROWS * MAX_RANK];
        float* to = sums + split * Kp;
        std::memset(to + k0, 0, sizeof(float) * (padded(k1) - k0));
        for (int64_t n0 = split * partition.rows; n0 < end; n0 += LOW_RANK_ADD_ROWS) {
          const int64_t rows = min(LOW_RANK_ADD_ROWS, end - n0);
          stage_factor<T>(B, s, n0, rows, B_cells, Rp);
          tile(B_cells, Rp, n0, rows, k0, k1,
               [&](int64_t, int64_t k, Vector v) { store(to + k, fma(v, v, load(to + k))); });
        }
      });
      parallel_for(ceil_div(K, W), [&](int64_t task) {
        for (int64_t k = task * W; k < min((task + 1) * W, K); ++k) {
          float sum = 0;
          for (int64_t split = 0; split < partition.splits; ++split) sum += sums[split * Kp + k];
          out[k] = std::sqrt(sum);
        }
      });
    }
  });
}

}  // namespace lorafast

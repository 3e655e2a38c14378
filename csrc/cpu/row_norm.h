// ‖W + sBA‖ along rows or columns: one pass over W, its sum with the low-rank part never leaving registers.
#pragma once

#include <cmath>

#include "grad_project.h"

namespace lorafast {

// v² of a tile of I rows and J vectors of V = W + B A, gathered into squares: per row, or per column.
template <class T>
class SquareTile {
 public:
  SquareTile(const Matrix<const T>& weight, const float* A, int64_t cells_of_R) : weight(weight), A(A), Rc(cells_of_R) {}

  // B's rows n0 .. n0+rows as cells [rows][B_row]; gather(row, k, v²) takes W of them.
  template <class Gather>
  void operator()(const float* B, int64_t B_row, int64_t n0, int64_t rows, int64_t k0, int64_t k1, Gather&& gather) const {
    by_rows<UP_ROWS>(rows, [&](auto rows_of, int64_t i) {
      constexpr int I = decltype(rows_of)::value;
      for (int64_t k = k0; k < k1; k += WIDE) {
        Vector sums[I][UP_VECTORS];
        clear(sums);
        multiply<paired<T>>(B + i * B_row, B_row, 1, A + k * Rc, WIDE, Rc, sums);
        for (int j = 0; j < UP_VECTORS && k + j * W < k1; ++j)
          for (int ii = 0; ii < I; ++ii) {
            const int64_t at = k + j * W;
            const Vector v = add(load_some(weight.row(n0 + i + ii) + at, weight.columns - at), sums[ii][j]);
            gather(i + ii, at, mul(v, v));
          }
      }
    });
  }

 private:
  const Matrix<const T>& weight;
  const float* A;
  int64_t Rc;
};

// `rows` rows of s·B, multiplied in fp32 and rounded to T, as cells along R.
template <class T>
inline void stage_factor(const Factor& B, float s, int64_t n0, int64_t rows, float* to, int64_t stride) {
  typed(B, [&](auto* data) {
    for (int64_t i = 0; i < rows; ++i) {
      const auto* from = data + (n0 + i) * B.stride_length;
      T narrow[MAX_RANK];
      for (int64_t r = 0; r < B.R; r += W) store(narrow + r, mul(gather(from + r * B.stride_R, B.stride_R, B.R - r), splat(s)));
      stage_rows<T>({narrow, 1, B.R, 0}, 0, 1, B.R, to + i * stride, 0);
    }
  });
}

// Whether there is anything but zeros: the first numbers tell, except of a factor that has not been trained yet. One so small that
// its square vanishes may pass for zero; whoever asks has another way then.
inline bool any(const Factor& f) {
  bool found = false;
  typed(f, [&](auto* data) {
    for (int64_t r = 0; r < f.R && !found; ++r)
      for (int64_t l = 0; l < f.length && !found; l += W) {
        const Vector v = gather(data + r * f.stride_R + l * f.stride_length, f.stride_length, f.length - l);
        found = total(mul(v, v)) != 0;
      }
  });
  return found;
}

// weight [N,K], A [R,K], B [R,N] as a Factor, out [N] or [K].
template <class T>
void row_norm(const Matrix<const T>& weight, const Factor& A, const Factor& B, float s, bool by_row, float* out, int threads) {
  const int64_t N = weight.rows, K = weight.columns, Kp = padded(K), Rp = padded(A.R);
  const Cut cut(N, K, GROUP);
  const Workspace work(packed_wide(K, A.R) + (by_row ? 0 : cut.shares * Kp));
  const SquareTile<T> tile(weight, work, cells<T>(A.R));
  float* sums = work + packed_wide(K, A.R);
  team(threads, [&] {
    pack_wide<T>(A, {}, work);
    if (by_row)
      each(ceil_div(N, UP_ROWS), [&](int64_t task) {
        const int64_t n0 = task * UP_ROWS, rows = at_most(UP_ROWS, N - n0);
        alignas(64) float b[UP_ROWS * MAX_RANK];
        Vector squares[UP_ROWS];
        for (auto& one : squares) one = zero();
        stage_factor<T>(B, s, n0, rows, b, Rp);
        tile(b, Rp, n0, rows, 0, K, [&](int64_t i, int64_t, Vector square) { squares[i] = add(squares[i], square); });
        for (int64_t i = 0; i < rows; ++i) out[n0 + i] = std::sqrt(total(squares[i]));
      });
    else {
      each(cut.shares * cut.groups, [&](int64_t task) {
        const int64_t share = task / cut.groups, end = at_most((share + 1) * cut.rows, N);
        const int64_t k0 = task % cut.groups * cut.columns, k1 = at_most(k0 + cut.columns, K);
        alignas(64) float b[UP_ROWS * MAX_RANK];
        float* to = sums + share * Kp;
        std::memset(to + k0, 0, sizeof(float) * (padded(k1) - k0));
        for (int64_t n0 = share * cut.rows; n0 < end; n0 += UP_ROWS) {
          const int64_t rows = at_most(UP_ROWS, end - n0);
          stage_factor<T>(B, s, n0, rows, b, Rp);
          tile(b, Rp, n0, rows, k0, k1, [&](int64_t, int64_t k, Vector square) { store(to + k, add(load(to + k), square)); });
        }
      });
      each(ceil_div(K, W), [&](int64_t task) {
        for (int64_t k = task * W; k < at_most((task + 1) * W, K); ++k) {
          float sum = 0;
          for (int64_t share = 0; share < cut.shares; ++share) sum += sums[share * Kp + k];
          out[k] = std::sqrt(sum);
        }
      });
    }
  });
}

}  // namespace lorafast

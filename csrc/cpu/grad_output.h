// One pass over dy: u = dy F, P = dyᵀ h', Σ dy and Σ dy⊙kept.
#pragma once

#include "project.h"
#include "grad_project.h"

namespace lorafast {

// Columns a task takes at least.
constexpr int64_t TASK_COLUMNS = 1024;

// What is asked of dy; what is not has a null pointer.
template <class T>
struct Asked {
  Factor F{};               // [R,N], for u
  Multiplier into_u{};      // of F's columns; s multiplies the sum instead
  Matrix<T> u{};            // [M,R]
  Matrix<const T> mixed{};  // h' [M,R]
  Multiplier into_P{};      // of P's rows
  Matrix<float> P{};        // [N,R]
  float* d_bias = nullptr;  // [N]
  Matrix<const T> kept{};   // [M,N]
  float* dot = nullptr;     // [N]

  // Rows of sums over tokens: P's, then one for the bias, then one for the dot.
  int64_t P_rows() const { return P.data ? mixed.columns : 0; }
  int64_t summed() const { return P_rows() + (d_bias != nullptr); }
  int64_t rows() const { return summed() + (dot != nullptr); }
};

// Where the parts of the workspace lie, in floats.
template <class T>
struct GradOutputWork {
  int64_t factor, u, sums;

  GradOutputWork(int64_t M, int64_t N, int64_t u_rank, int64_t sum_rows)
      : factor(u_rank ? packed_long<T>(N, u_rank) : 0),
        u(u_rank ? Cut(M, N, TASK_COLUMNS).groups * M * round_up(u_rank, DOWN_RANKS) + W : 0),
        sums(Cut(M, N, TASK_COLUMNS).shares * sum_rows * round_up(N, GROUP)) {}
  int64_t floats() const { return factor + u + sums; }
};

// sums[0:columns] += Σ_m dy[m] kept[m] over a panel of which dy's cells are at hand.
template <class T>
inline void dot_tile(const float* dy, const float* kept, int64_t P, float* sums) {
  Vector part[OUTER_VECTORS];
  for (auto& one : part) one = zero();
  for (int64_t p = 0; p < P; ++p, dy += OUTER_COLUMNS, kept += OUTER_COLUMNS)
#pragma GCC unroll 4
    for (int j = 0; j < OUTER_VECTORS; ++j) part[j] = mac<paired<T>>(part[j], load(dy + j * W), load(kept + j * W));
  for (int j = 0; j < OUTER_VECTORS; ++j) store(sums + j * W, add(load(sums + j * W), part[j]));
}

// The sums of one share of the tokens and one group of the columns, and what u gets from these columns.
template <class T>
class GradOutputTask {
 public:
  GradOutputTask(const Matrix<const T>& dy, const Asked<T>& asked, const float* packed)
      : dy(dy), asked(asked), packed(packed), left_stride(padded(asked.summed())) {}

  void operator()(int64_t m_first, int64_t m_end, int64_t n_first, int64_t n_end, float* u, float* sums) {
    const int64_t ranks = round_up(asked.u.columns, DOWN_RANKS), all = asked.rows();
    std::memset(sums + n_first * all, 0, sizeof(float) * (round_up(n_end, OUTER_COLUMNS) - n_first) * all);
    if (asked.u.data) std::memset(u + m_first * ranks, 0, sizeof(float) * (m_end - m_first) * ranks);
    for (int64_t m = m_first; m < m_end; m += PANEL<T>) {
      const int64_t rows = at_most(PANEL<T>, m_end - m);
      // The first to read the panel brings it near for the other.
      if (asked.u.data)
        for (int64_t n = n_first; n < n_end; n += DOWN_COLUMNS<T>)
          down_tile(dy, m, rows, n, at_most(DOWN_COLUMNS<T>, n_end - n), nullptr, 0, packed, ranks, u + m * ranks);
      if (!all) continue;
      stage_left(m, rows);
      for (int64_t n = n_first; n < n_end; n += OUTER_COLUMNS) {
        const int64_t columns = at_most(OUTER_COLUMNS, n_end - n);
        if ((n - n_first) % GROUP == 0) {
          stage_group(dy, m, rows, n, n_end, right);
          if (asked.dot) stage_group(asked.kept, m, rows, n, n_end, kept);
        }
        outer_tile<T>(left, left_stride, asked.summed(), right.at(n, n_first), cells<T>(rows), columns, sums + sums_of(n, all));
        if (asked.dot)
          dot_tile<T>(right.at(n, n_first), kept.at(n, n_first), cells<T>(rows),
                      sums + sums_of(n, all) + asked.summed() * OUTER_COLUMNS);
      }
    }
  }

 private:
  // h' as cells, and beside it the ones whose product with dy is the bias's gradient.
  void stage_left(int64_t m, int64_t rows) {
    if (asked.P.data) stage_columns(asked.mixed, m, rows, 0, asked.P_rows(), nullptr, 0, left, left_stride, 0);
    if (asked.d_bias) {
      float one[W];
      store(one, cell<T>(splat(1), splat(1)));
      for (int64_t p = 0; p < cells<T>(rows); ++p) left[p * left_stride + asked.P_rows()] = one[0];
    }
  }

  static void stage_group(const Matrix<const T>& x, int64_t m, int64_t rows, int64_t n, int64_t n_end, Staged& to) {
    stage_columns(x, m, rows, n, at_most(GROUP, n_end - n), nullptr, 0, to.cells, OUTER_COLUMNS, BLOCK);
  }

  const Matrix<const T>& dy;
  const Asked<T>& asked;
  const float* packed;
  // No wider than it must be: a wider one puts the rows where they drive each other from the cache.
  const int64_t left_stride;
  alignas(64) float left[PANEL<T> * (MAX_RANK + W) + 2 * W];
  Staged right, kept;
};

// The shares of W columns added up, and laid as the gradients lie.
template <class T>
inline void finish_sums(const Asked<T>& asked, int64_t N, int64_t shares, const float* sums, int64_t n) {
  const int64_t Np = round_up(N, GROUP), rows = asked.rows(), some = at_most(W, N - n);
  for (int64_t r = 0; r < rows; ++r) {
    Vector sum = zero();
    for (int64_t share = 0; share < shares; ++share)
      sum = add(sum, load(sums + share * rows * Np + sums_of(n, rows) + r * OUTER_COLUMNS));
    if (r >= asked.P_rows()) {
      store_some((asked.d_bias && r == asked.P_rows() ? asked.d_bias : asked.dot) + n, sum, some);
      continue;
    }
    float lanes[W];
    store(lanes, sum);
    for (int64_t i = 0; i < some; ++i) asked.P.row(n + i)[r] = asked.into_P.at(n + i) * lanes[i];
  }
}

// dy [M,N].
template <class T>
void grad_output(const Matrix<const T>& dy, const Asked<T>& asked, int threads) {
  const int64_t M = dy.rows, N = dy.columns, R = asked.u.data ? asked.u.columns : 0, ranks = round_up(R, DOWN_RANKS);
  const Cut cut(M, N, TASK_COLUMNS);
  const GradOutputWork<T> places(M, N, R, asked.rows());
  const Workspace work(places.floats());
  float *packed = work, *u = packed + places.factor, *sums = u + places.u;
  const Vector s = splat(asked.into_u.s);
  team(threads, [&] {
    if (R) pack_long<T>(asked.F, {1, asked.into_u.gain, asked.into_u.scale}, packed);
    each(cut.shares * cut.groups, [&](int64_t task) {
      const int64_t share = task / cut.groups, group = task % cut.groups;
      GradOutputTask<T> sum(dy, asked, packed);
      sum(share * cut.rows, at_most((share + 1) * cut.rows, M), group * cut.columns, at_most((group + 1) * cut.columns, N),
          u + group * M * ranks, sums + share * asked.rows() * round_up(N, GROUP));
    });
    if (asked.rows()) each(ceil_div(N, W), [&](int64_t task) { finish_sums(asked, N, cut.shares, sums, task * W); });
    if (R)
      each(ceil_div(M, W), [&](int64_t task) {
        for (int64_t m = task * W; m < at_most((task + 1) * W, M); ++m)
          for (int64_t r = 0; r < R; r += W) {
            Vector sum = zero();
            for (int64_t group = 0; group < cut.groups; ++group) sum = add(sum, load(u + (group * M + m) * ranks + r));
            store_some(asked.u.row(m) + r, mul(sum, s), R - r);
          }
      });
  });
}

}  // namespace lorafast

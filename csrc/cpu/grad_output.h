// grad_output: u = dy Fᵀ, P = dyᵀ h_core, Σ dy and Σ dy⊙kept, in one pass over dy.
#pragma once

#include "grad_project.h"
#include "project.h"

namespace lorafast {

// The least columns of a task.
constexpr int64_t GRAD_OUTPUT_TASK_COLUMNS = 1024;

// The operands and results of one call. A result that is not requested has a null pointer.
template <class T>
struct GradOutputRequest {
  Factor F{};                  // [R,N], for u
  ColumnScale u_scale{};       // of F's columns, except that s multiplies the sum
  Matrix<LowRankGrad<T>> u{};  // [M,R]
  Matrix<const T> h_core{};    // [M,R]
  ColumnScale P_scale{};       // of P's rows
  Matrix<float> P{};           // [N,R]
  float* d_bias = nullptr;     // [N]
  Matrix<const T> kept{};      // [M,N]
  float* dot = nullptr;        // [N]

  // The rows of sums over tokens: those of P, then one for d_bias, then one for dot.
  // grad_project_tile computes all of them but dot.
  int64_t P_rows() const { return P.data ? h_core.columns : 0; }
  int64_t tile_rows() const { return P_rows() + (d_bias != nullptr); }
  int64_t rows() const { return tile_rows() + (dot != nullptr); }
};

// The sizes of the parts of the workspace, in floats.
template <class T>
struct GradOutputWork {
  int64_t factor, u, sums;

  GradOutputWork(int64_t M, int64_t N, int64_t u_rank, int64_t sum_rows)
      : factor(u_rank ? project_pack_size<T>(N, u_rank) : 0),
        u(u_rank ? Partition(M, N, GRAD_OUTPUT_TASK_COLUMNS).groups * M *
                           round_up(u_rank, PROJECT_RANKS) +
                       W
                 : 0),
        sums(Partition(M, N, GRAD_OUTPUT_TASK_COLUMNS).splits * sum_rows *
             round_up(N, STAGED_COLUMNS)) {}
  int64_t floats() const { return factor + u + sums; }
};

// sums[0:GRAD_PROJECT_COLUMNS] += Σ_p dy[p]⊙kept[p] for p < steps, both one block of staged
// columns.
template <class T>
inline void dot_tile(const float* dy, const float* kept, int64_t steps, float* sums) {
  Vector tile[GRAD_PROJECT_VECTORS];
  for (auto& sum : tile) sum = zero();
  for (int64_t p = 0; p < steps; ++p, dy += GRAD_PROJECT_COLUMNS, kept += GRAD_PROJECT_COLUMNS)
#pragma GCC unroll 4
    for (int j = 0; j < GRAD_PROJECT_VECTORS; ++j)
      tile[j] = mac<paired<T>>(tile[j], load(dy + j * W), load(kept + j * W));
  for (int j = 0; j < GRAD_PROJECT_VECTORS; ++j)
    store(sums + j * W, add(load(sums + j * W), tile[j]));
}

// One task: the sums over one split of the tokens for one group of columns, and the part of u that
// these columns contribute.
template <class T>
class GradOutputTask {
 public:
  GradOutputTask(const Matrix<const T>& dy, const GradOutputRequest<T>& request,
                 const float* packed)
      : dy(dy), request(request), packed(packed), left_stride(padded(request.tile_rows())) {}

  void operator()(int64_t m_first, int64_t m_end, int64_t n_first, int64_t n_end, float* u,
                  float* sums) {
    const int64_t ranks = round_up(request.u.columns, PROJECT_RANKS), sum_rows = request.rows();
    std::memset(sums + n_first * sum_rows, 0,
                sizeof(float) * (round_up(n_end, GRAD_PROJECT_COLUMNS) - n_first) * sum_rows);
    if (request.u.data)
      std::memset(u + m_first * ranks, 0, sizeof(float) * (m_end - m_first) * ranks);
    for (int64_t m = m_first; m < m_end; m += ROW_BLOCK<T>) {
      const int64_t rows = min(ROW_BLOCK<T>, m_end - m);
      // u reads the row block first and brings it into the cache for the sums over tokens.
      if (request.u.data)
        for (int64_t n = n_first; n < n_end; n += PROJECT_COLUMNS<T>)
          project_tile(dy, m, rows, n, min(PROJECT_COLUMNS<T>, n_end - n), nullptr, 0, packed,
                       ranks, u + m * ranks);
      if (!sum_rows) continue;
      stage_left(m, rows);
      for (int64_t n = n_first; n < n_end; n += GRAD_PROJECT_COLUMNS) {
        const int64_t columns = min(GRAD_PROJECT_COLUMNS, n_end - n);
        if ((n - n_first) % STAGED_COLUMNS == 0) {
          stage_columns_of(dy, m, rows, n, n_end, dy_cells);
          if (request.dot) stage_columns_of(request.kept, m, rows, n, n_end, kept_cells);
        }
        grad_project_tile<T>(left, left_stride, request.tile_rows(), dy_cells.block(n, n_first),
                             cells<T>(rows), columns, sums + sums_offset(n, sum_rows));
        if (request.dot)
          dot_tile<T>(dy_cells.block(n, n_first), kept_cells.block(n, n_first), cells<T>(rows),
                      sums + sums_offset(n, sum_rows) + request.tile_rows() * GRAD_PROJECT_COLUMNS);
      }
    }
  }

 private:
  // The left operand: h_core as cells, then a column of ones, whose product with dy is d_bias.
  void stage_left(int64_t m, int64_t rows) {
    if (request.P.data)
      stage_columns(request.h_core, m, rows, 0, request.P_rows(), nullptr, 0, left, left_stride, 0);
    if (request.d_bias) {
      float ones[W];
      store(ones, make_cells<T>(broadcast(1), broadcast(1)));
      for (int64_t p = 0; p < cells<T>(rows); ++p)
        left[p * left_stride + request.P_rows()] = ones[0];
    }
  }

  static void stage_columns_of(const Matrix<const T>& x, int64_t m, int64_t rows, int64_t n,
                               int64_t n_end, StagedColumns& to) {
    stage_columns(x, m, rows, n, min(STAGED_COLUMNS, n_end - n), nullptr, 0, to.cells,
                  GRAD_PROJECT_COLUMNS, STAGED_BLOCK_STRIDE);
  }

  const Matrix<const T>& dy;
  const GradOutputRequest<T>& request;
  const float* packed;
  // As small as possible: with a larger stride the rows would evict each other from the cache.
  const int64_t left_stride;
  alignas(64) float left[ROW_BLOCK<T> * (MAX_RANK + W) + 2 * W];
  StagedColumns dy_cells, kept_cells;
};

// Adds the splits' sums of W columns from column n on, and stores them in the layouts of the
// gradients.
template <class T>
inline void finish_sums(const GradOutputRequest<T>& request, int64_t N, int64_t splits,
                        const float* sums, int64_t n) {
  const int64_t Np = round_up(N, STAGED_COLUMNS), rows = request.rows(), count = min(W, N - n);
  for (int64_t r = 0; r < rows; ++r) {
    Vector sum = zero();
    for (int64_t split = 0; split < splits; ++split)
      sum = add(sum,
                load(sums + split * rows * Np + sums_offset(n, rows) + r * GRAD_PROJECT_COLUMNS));
    if (r >= request.P_rows()) {
      store_partial((request.d_bias && r == request.P_rows() ? request.d_bias : request.dot) + n,
                    sum, count);
      continue;
    }
    float lanes[W];
    store(lanes, sum);
    for (int64_t i = 0; i < count; ++i)
      request.P.row(n + i)[r] = request.P_scale.at(n + i) * lanes[i];
  }
}

// Computes what is requested of dy [M,N].
template <class T>
void grad_output(const Matrix<const T>& dy, const GradOutputRequest<T>& request, int threads) {
  const int64_t M = dy.rows, N = dy.columns, R = request.u.data ? request.u.columns : 0,
                ranks = round_up(R, PROJECT_RANKS);
  const Partition partition(M, N, GRAD_OUTPUT_TASK_COLUMNS);
  const GradOutputWork<T> sizes(M, N, R, request.rows());
  const Workspace work(sizes.floats());
  float *packed = work, *u = packed + sizes.factor, *sums = u + sizes.u;
  const Vector s = broadcast(request.u_scale.s);
  parallel(threads, [&] {
    if (R)
      pack_for_project<LowRankGrad<T>>(request.F, {1, request.u_scale.gain, request.u_scale.scale},
                                       packed);
    parallel_for(partition.splits * partition.groups, [&](int64_t task) {
      const int64_t split = task / partition.groups, group = task % partition.groups;
      GradOutputTask<T> run_task(dy, request, packed);
      run_task(split * partition.rows, min((split + 1) * partition.rows, M),
               group * partition.columns, min((group + 1) * partition.columns, N),
               u + group * M * ranks, sums + split * request.rows() * round_up(N, STAGED_COLUMNS));
    });
    if (request.rows())
      parallel_for(ceil_div(N, W), [&](int64_t task) {
        finish_sums(request, N, partition.splits, sums, task * W);
      });
    if (R)
      parallel_for(ceil_div(M, W), [&](int64_t task) {
        for (int64_t m = task * W; m < min((task + 1) * W, M); ++m)
          for (int64_t r = 0; r < R; r += W) {
            Vector sum = zero();
            for (int64_t group = 0; group < partition.groups; ++group)
              sum = add(sum, load(u + (group * M + m) * ranks + r));
            store_partial(request.u.row(m) + r, mul(sum, s), R - r);
          }
      });
  });
}

}  // namespace lorafast

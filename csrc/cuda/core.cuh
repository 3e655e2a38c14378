// h and h' = core(h) from the sums of a warp: rows as in mma.cuh, TILES of eight ranks.
#pragma once
#include "mma.cuh"

namespace lorafast {

// The core: element (i, j) at data[i·down + j·right]; dims 1 for a diagonal, data[i·down]; 0 for
// none.
struct Core {
  const void* data;
  int dtype, dims;
  int64 down, right;

  DEVICE float at(int i, int j, int R) const {
    return i < R && j < R ? number_at(data, dtype, i * down + j * right) : 0.0f;
  }
};

template <class T>
struct Projection {
  T *h, *h_core;  // [M,R], dense
  int64 M;
  int R, first_rank;

  DEVICE void store(T* to, int64 row, int rank, float value) const {
    if (row < M && rank < R) to[row * R + rank] = rounded<T>(value);
  }

  // sum[t]: rows `row` and row+8, ranks 8t+2c and 8t+2c+1 from first_rank on. h is rounded, and h'
  // is that of the rounded h, whose k axis lies as the registers of h do. A full core: up to eight
  // tiles.
  template <int TILES>
  DEVICE void finish(float (&sum)[TILES][4], int64 row, float scale, const Core& core) const {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int rank = first_rank + 8 * t + 2 * c + i % 2;
        const float value = rank < R ? widened(rounded<T>(sum[t][i] * scale)) : 0.0f;
        sum[t][i] = value;
        store(h, row + i / 2 * 8, rank, value);
        if (core.dims == 1 && rank < R) {
          const float factor =
              widened(rounded<T>(number_at(core.data, core.dtype, rank * core.down)));
          store(h_core, row + i / 2 * 8, rank, value * factor);
        }
      }
    }
    if constexpr (TILES <= 8) {
      if (core.dims == 2) multiply_by_core(sum, row, core, g, c);
    }
  }

  template <int TILES>
  DEVICE void multiply_by_core(const float (&h_sum)[TILES][4], int64 row, const Core& core, int g,
                               int c) const {
    constexpr int BLOCKS = (TILES + 1) / 2;
    RowFragment<T> rows[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = 2 * b + half;
        const float* v = h_sum[t % TILES];
        const bool there = t < TILES;
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            rows[b].word[4 * half + i] = there ? __float_as_uint(v[i / 2 + i % 2 * 2]) : 0;
        } else {
          rows[b].word[2 * half] = there ? rounded_pair<T>(v[0], v[1]) : 0;
          rows[b].word[2 * half + 1] = there ? rounded_pair<T>(v[2], v[3]) : 0;
        }
      }
    }
#pragma unroll 1
    for (int t = 0; t < TILES; ++t) {
      float mixed[4] = {};
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[i] = core.at(8 * t + g, 16 * b + 8 * (i / 2) + 2 * c + i % 2, R);
        multiply(mixed, rows[b], rounded_column<T>(v));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) store(h_core, row + i / 2 * 8, 8 * t + 2 * c + i % 2, mixed[i]);
    }
  }
};

// Σ of parts that lie `apart`, added in order.
DEVICE float sum_in_order(const float* parts, int64 apart, int splits) {
  float sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += __ldg(parts + split * apart);
  return sum;
}

// What a warp has to finish of h = scale·Σ parts [splits,M,R] and h' = core(h): rows `row` and
// row+8 of the lane.
template <int TILES, class T>
DEVICE void finish_parts(const Projection<T>& to, const float* parts, int64 row, int splits,
                         float scale, const Core& core) {
  const int c = threadIdx.x & 3;
  float sum[TILES][4] = {};
#pragma unroll 1
  for (int split = 0; split < splits; ++split) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64 own = row + i / 2 * 8, from = split * to.M + own;
        const int rank = to.first_rank + 8 * t + 2 * c + i % 2;
        if (own < to.M && rank < to.R) sum[t][i] += __ldg(parts + from * to.R + rank);
      }
    }
  }
  to.finish(sum, row, scale, core);
}

}  // namespace lorafast

// h [M,R] = scale·drop(x) Aᵀ and h_core = core(h); or, for project_finish, sums of them. Grid
// (⌈M/ROWS⌉, splits, ⌈R/(8·TILES)⌉), 128 threads; ROWS is 32, and 16 for more than 32 ranks.
//
// Flags: 1 x is dropped; 2 ALIGNED: x has unit `right`, rows 16 bytes aligned, K a multiple of 8; 4
// PARTS: out is fp32 [splits,M,R], unscaled; 8 RAW: A is fp32, and rounded here, of at most 64
// ranks. Without PARTS there is one split and one block of ranks; a full core then has at most 64.
// A has dense rows, 16 bytes aligned, and is padded with zeros to a multiple of 8·TILES ranks and
// of eight columns. `steps` times 32 columns are a split.
#include "form.cuh"
#include "project.cuh"

using namespace lorafast;

constexpr bool DROPS = has(1), ALIGNED = has(2), PARTS = has(4);
using Factor = TypeOf<has(8) ? FP32 : LORAFAST_DTYPE>::type;
constexpr int GROUPS = FORM_TILES <= 4 ? 2 : 1;

LORAFAST_ENTRY(32 * PROJECT_WARPS, FORM_TILES <= 2 && sizeof(Number) == 2 ? 3 : 1)
project(const Number* x, const Factor* A, const int64* seed, void* out, Number* h_core,
        const void* core, int64 M, int64 x_down, int64 x_right, int64 A_down, int64 core_down,
        int64 core_right, int64 groups, int K, int R, int steps, uint32 threshold, float scale,
        int core_dims, int core_dtype) {
  __shared__ float buffer[PROJECT_WARPS / 2 * GROUPS * FORM_TILES * 4 * 32];
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const int64 row0 = int64(blockIdx.x) * 16 * GROUPS + g;
  const int first_rank = blockIdx.z * 8 * FORM_TILES;
  Project<Number, Factor, FORM_TILES, GROUPS, DROPS, ALIGNED> product{x,          x_down, x_right,
                                                                      8 * A_down, M,      K};
  product.run(blockIdx.y * steps, steps, row0, A + (first_rank + g) * A_down,
              Dropout(DROPS ? seed : nullptr, groups, threshold));
  add_over_warps<PROJECT_WARPS, GROUPS * FORM_TILES * 4>(
      reinterpret_cast<float (&)[GROUPS * FORM_TILES * 4]>(product.sum), buffer);
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
    const int64 row = row0 + 16 * i;
    if constexpr (PARTS) {
      float* parts = static_cast<float*>(out) + blockIdx.y * M * R;
#pragma unroll
      for (int t = 0; t < FORM_TILES; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int rank = first_rank + 8 * t + 2 * c + j % 2;
          if (row + j / 2 * 8 < M && rank < R)
            parts[(row + j / 2 * 8) * R + rank] = product.sum[i][t][j];
        }
      }
    } else {
      const Projection<Number> to{static_cast<Number*>(out), h_core, M, R, first_rank};
      to.finish(product.sum[i], row, scale,
                Core{core, core_dtype, core_dims, core_down, core_right});
    }
  }
}

// h [M,R] = scale·Σ parts, added in order, and h_core = core(h).  Grid (⌈M/16⌉, ⌈R/(8·TILES)⌉), 32
// threads. The parts are R columns of fp32 [splits,M,width] from `parts` on. LORAFAST_DTYPE is h's.
// A full core has at most 64 ranks, and they are in one block.
#include "core.cuh"
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(32, 1)
project_finish(const float* parts, Number* h, Number* h_core, const void* core, int64 M,
               int64 core_down, int64 core_right, int R, int width, int splits, float scale,
               int core_dims, int core_dtype) {
  const int g = threadIdx.x >> 2, c = threadIdx.x & 3;
  const int64 row = int64(blockIdx.x) * 16 + g;
  const int first_rank = blockIdx.y * 8 * FORM_TILES;
  float sum[FORM_TILES][4] = {};
#pragma unroll 1
  for (int split = 0; split < splits; ++split) {
#pragma unroll
    for (int t = 0; t < FORM_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64 from = split * M + row + i / 2 * 8;
        const int rank = first_rank + 8 * t + 2 * c + i % 2;
        if (row + i / 2 * 8 < M && rank < R) sum[t][i] += __ldg(parts + from * width + rank);
      }
    }
  }
  const Projection<Number> to{h, h_core, M, R, first_rank};
  to.finish(sum, row, scale, Core{core, core_dtype, core_dims, core_down, core_right});
}

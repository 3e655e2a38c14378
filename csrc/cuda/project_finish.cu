// h [M,R] = scale·Σ parts, added in order, and h_core = core(h).  Grid (⌈M/16⌉, ⌈R/(8·TILES)⌉), 32
// threads. parts fp32 [splits,M,R]. LORAFAST_DTYPE is h's. A full core has at most 64 ranks, and
// they are in one block.
#include "core.cuh"
#include "form.cuh"

using namespace lorafast;

LORAFAST_ENTRY(32, 1)
project_finish(const float* parts, Number* h, Number* h_core, const void* core, int64 M,
               int64 core_down, int64 core_right, int R, int splits, float scale, int core_dims,
               int core_dtype) {
  const int64 row = int64(blockIdx.x) * 16 + (threadIdx.x >> 2);
  const Projection<Number> to{h, h_core, M, R, int(blockIdx.y) * 8 * FORM_TILES};
  finish_parts<FORM_TILES>(to, parts, row, splits, scale,
                           {core, core_dtype, core_dims, core_down, core_right});
}

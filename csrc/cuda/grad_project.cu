// out fp32 [splits,R,K] = scale·vᵀ drop(x), one part for each split of the tokens. Grid (⌈K/64⌉,
// splits, ⌈R/(8·TILES)⌉), 128 threads. v [M,R] has dense rows; with C = min(TILES, 8), R is a
// multiple of C, and rows are aligned to C numbers, or to 16 bytes if those are more.
//
// Flags: 1 x is dropped; 2 ALIGNED: x has unit `right`, rows 16 bytes aligned, K a multiple of 8.
#include "form.cuh"
#include "grad_project.cuh"

using namespace lorafast;

constexpr bool DROPS = has(1), ALIGNED = has(2);

LORAFAST_ENTRY(32 * GRAD_PROJECT_WARPS, FORM_TILES <= 2 && sizeof(Number) == 2 ? 3 : 1)
grad_project(const Number* x, const Number* v, const int64* seed, float* out, int64 M, int64 x_down,
             int64 x_right, int64 v_down, int64 groups, int64 steps, int K, int R, uint32 threshold,
             float scale) {
  __shared__ float buffer[GRAD_PROJECT_WARPS / 2 * FORM_TILES * 16 * 32];
  const int column = blockIdx.x * 64 + (threadIdx.x & 31) / 4 * 8;
  const int first_rank = blockIdx.z * 8 * FORM_TILES;
  GradProject<Number, FORM_TILES, DROPS, ALIGNED> product{x, v, x_down, x_right, v_down, M, K, R};
  product.run(blockIdx.y * steps, steps, column, first_rank,
              Dropout(DROPS ? seed : nullptr, groups, threshold));
  add_over_warps<GRAD_PROJECT_WARPS, FORM_TILES * 16>(
      reinterpret_cast<float (&)[FORM_TILES * 16]>(product.sum), buffer);
  if (threadIdx.x < 32) product.store(out + blockIdx.y * int64(R) * K, column, first_rank, scale);
}

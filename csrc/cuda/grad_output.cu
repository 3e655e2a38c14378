// Parts of what is asked for of dy, all fp32, for grad_output_finish: u [⌈N/512⌉,M,u_ranks] = dy F;
// product [splits,h_ranks,N] = hᵀ dy; sums [splits,1 or 2,N], Σ dy and Σ dy⊙kept. Grid (⌈N/256⌉,
// splits), 128 threads, or (⌈N/512⌉, splits), 256 threads with u; a split is `steps` times sixteen
// tokens. h is like v of grad_project. F = s·gain⊙B, rounded once; gain is m/norm, or m if norm is
// null, 1 if m is; scale, the tensor of s, may be null. More ranks of u, and more than 32 of h,
// take other kernels: project and grad_project.
//
// Flags: 1 U, with P, ALIGNED and at most 16 ranks; 2 ALIGNED: dy and kept have unit `right`, rows
// 16 bytes aligned, N a multiple of eight; 4 P; 8 SUMS: Σ dy; 16 DOT: Σ dy⊙kept, with SUMS, and
// with P only if ALIGNED and not in fp32.
#include "form.cuh"
#include "grad_output.cuh"

using namespace lorafast;

constexpr bool U = has(1), ALIGNED = has(2), P = has(4), SUMS = has(8), DOT = has(16);

constexpr int WARPS = grad_output_warps(U);

LORAFAST_ENTRY(32 * WARPS, 1)
grad_output(const Number* dy, const Number* kept, const Number* h, const void* m, const float* norm,
            const float* B, const void* scale, float* u, float* product, float* sums, int64 M,
            int64 dy_down, int64 dy_right, int64 kept_down, int64 kept_right, int64 h_down,
            int64 B_down, int64 B_right, int64 steps, int N, int u_ranks, int h_ranks,
            int scale_dtype, int m_dtype, float scaling) {
  __shared__ float buffer[U ? 2 * WARPS * 256 : 1];
  const int column = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * 64;
  const int64 split = blockIdx.y;
  GradOutput<Number, FORM_TILES, U, P, SUMS, DOT, ALIGNED> grads{
      dy,        kept,       h,       dy_down, dy_right,
      kept_down, kept_right, h_down,  M,       u + blockIdx.x * M * u_ranks,
      N,         u_ranks,    h_ranks, buffer};
  if (U) {
    const float s = scaling * (scale ? number_at(scale, scale_dtype, 0) : 1.0f);
    grads.load_factor({B, {m, norm, m_dtype}, B_down, B_right, s}, column);
  }
  if (!U || (blockIdx.x + 1) * 64 * WARPS <= N) {
    grads.run<true>(split * steps, steps, column);
  } else {
    grads.run<false>(split * steps, steps, column);
  }
  grads.store(product + split * h_ranks * N, sums + split * (SUMS + DOT) * N, column);
}

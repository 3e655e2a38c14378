// What a form is compiled for. Each .cu is one kernel; a form of it is one compilation with
//   LORAFAST_DTYPE      0 bf16, 1 fp16, 2 fp32: the large operand, and what is multiplied with it
//   LORAFAST_TILES      the ranks of a block, in eights
//   LORAFAST_FLAGS      the sum of the kernel's flags, which its own file names
//   LORAFAST_TF32       1: fp32 is multiplied in tf32
// and its entry has the name of the file.
#pragma once
#include "mma.cuh"

#ifndef LORAFAST_TILES
#define LORAFAST_TILES 2
#endif
#ifndef LORAFAST_FLAGS
#define LORAFAST_FLAGS 0
#endif

// blocks: those that a multiprocessor has to hold at least.
#define LORAFAST_ENTRY(threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks)

namespace lorafast {

using Number = TypeOf<LORAFAST_DTYPE>::type;
constexpr int FORM_TILES = LORAFAST_TILES;
// The tiles of ranks that low_rank_add and row_norm multiply at once, for want of registers.
constexpr int MOST_TILES = sizeof(Number) == 4 ? 4 : 8;

// True if the form has a flag.
__host__ __device__ constexpr bool has(int flag) { return (LORAFAST_FLAGS & flag) != 0; }

}  // namespace lorafast

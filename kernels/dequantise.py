"""dequantise_4bit: W, or a run of its numbers, from 4 bits: code[index] · absmax of the block.

It reads half a byte a number, and the sixteen numbers of the code from the cache.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch


@triton.jit
def dequantise_kernel(
    packed_ptr, absmax_ptr, code_ptr, out_ptr, skipped, stop, stop_byte,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = the numbers skipped ... stop of blocks of GROUP.  Grid ⌈stop_byte/BLOCK_K⌉.

    A byte has two of them, the high half first. Each product is rounded once.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_K
    byte = first + tl.arange(0, BLOCK_K)
    pair = tl.load(packed_ptr + byte, mask=byte < stop_byte, other=0).to(tl.int32)
    # GROUP is even: both halves of a byte are of one block.
    absmax = tl.load(absmax_ptr + byte // (GROUP // 2), mask=byte < stop_byte, other=0.0)
    high = (tl.load(code_ptr + (pair >> 4)) * absmax).to(out_ptr.dtype.element_ty)
    low = (tl.load(code_ptr + (pair & 15)) * absmax).to(out_ptr.dtype.element_ty)
    number = 2 * first + tl.arange(0, 2 * BLOCK_K)
    inside = (number >= skipped) & (number < stop)
    tl.store(out_ptr + (number - skipped), tl.interleave(high, low), mask=inside)


def dequantise_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    first: int,
    out: torch.Tensor,
) -> None:
    """Write the numbers first, first + 1, ... of a weight into out, as many as it holds.

    packed uint8, absmax fp32 [blocks], code fp32 [16] and out are dense; blocksize is even.
    """
    if not out.numel():
        return
    block, skipped = divmod(first, blocksize)
    stop = skipped + out.numel()
    stop_byte, tile = configs.ceil_div(stop, 2), configs.dequantise(out.dtype)
    launch.run(
        dequantise_kernel, (configs.ceil_div(stop_byte, tile.BLOCK_K),), tile,
        packed.view(-1)[block * blocksize // 2 :], absmax[block:], code, out, skipped, stop,
        stop_byte, GROUP=blocksize,
    )  # fmt: skip

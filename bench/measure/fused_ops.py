"""The operations of torch that allocate otherwise on a device than on meta tensors.

torch picks the kernel of attention and of dropout by device, and meta tensors get what no device
would run: attention with its whole matrix of scores. Inside fused_ops they get what a device
allocates:

- attention: its output and the logarithms of its sums (fp32), and no scores. On a GPU that is
  FlashAttention-2 as torch has it, whose backward also needs dq in fp32, and dk and dv for every
  head of q; on a CPU it is torch's own flash kernel, which serves without dropout.
- dropout: on a GPU a mask of one byte an element; on a CPU, noise in x's dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F

# What takes the flops of attention: forward, and backward, which computes the scores again.
NoteProduct = Callable[[str, int, int], None]
_BACKWARD_FLOPS = 2.5


@contextlib.contextmanager
def fused_ops(on_gpu: bool, note: NoteProduct | None = None) -> Iterator[None]:
    """Let meta tensors allocate in attention and dropout what a device does.

    torch's functions are replaced, because a mode is not active where checkpointing computes a
    block again.

    Args:
        on_gpu: what a GPU allocates; otherwise a CPU.
        note: called with a name, flops and bytes for each pass of attention.
    """
    attend, drop = F.scaled_dot_product_attention, F.dropout

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        fused = (on_gpu or not dropout_p) and query.is_meta
        if fused and (attn_mask is None or not attn_mask.requires_grad):
            return _Attention.apply(query, key, value, attn_mask, is_causal, on_gpu, note)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)

    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if input.is_meta and on_gpu and training and p and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return drop(input, p, training, inplace)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "dropout", dropout),
    ):
        yield


class _Attention(torch.autograd.Function):
    """The tensors of a fused attention. q [B,H,S,D], k, v [B,G,T,D] -> [B,H,S,D]"""

    @staticmethod
    def forward(ctx, q, k, v, mask, is_causal, on_gpu, note):
        batch, heads, rows, width = q.shape
        # Both kernels write [B,S,H,D], so that the heads join without a copy.
        y = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, y, sums)
        ctx.on_gpu, ctx.note = on_gpu, note
        # Two products; a causal mask halves them.
        ctx.flops = 4 * batch * heads * rows * k.shape[2] * width // (2 if is_causal else 1)
        if note is not None:
            note("attention", ctx.flops, _bytes(q, k, v, y))
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, _, y, _ = ctx.saved_tensors
        (batch, heads, rows, width), (_, groups, columns, _) = q.shape, k.shape
        temporary = []
        if ctx.on_gpu:
            padded = 128 * math.ceil(rows / 128)
            temporary.append(q.new_empty(batch, heads, padded, width, dtype=torch.float32))
            temporary.append(q.new_empty(batch, heads, padded, dtype=torch.float32))
        dq = q.new_empty(batch, rows, heads, width).transpose(1, 2)
        dk = k.new_empty(batch, columns, groups, width).transpose(1, 2)
        dv = v.new_empty(batch, columns, groups, v.shape[-1]).transpose(1, 2)
        if ctx.on_gpu and heads != groups:
            temporary.append(k.new_empty(batch, columns, heads, width))
            temporary.append(v.new_empty(batch, columns, heads, v.shape[-1]))
        if ctx.note is not None:
            flops = int(_BACKWARD_FLOPS * ctx.flops)
            ctx.note("attention, backward", flops, _bytes(q, k, v, y, dy, dq, dk, dv))
        return dq, dk, dv, None, None, None, None


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

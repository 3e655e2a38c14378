"""The dropout bits: Philox-4x32-7, a pure function of (seed, row, column).

One call gives the bits of 8 neighbouring columns as 16-bit halves. Every backend must drop exactly
these elements. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

from lorafast.engine.problem import tokens
from lorafast.engine.row_blocks import flatten_tokens, row_blocks

ROUNDS = 7
GROUP = 8
# A half has 16 bits: probabilities are multiples of 1/65536.
STEPS = 65536
_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """t = round(p·65536): an element is kept if its 16-bit half is at least t.

    ValueError for a p above 0 that rounds to dropping nothing or everything.
    """
    t = round(p * STEPS)
    if p and not 0 < t < STEPS:
        effect = "everything" if t else "nothing"
        raise ValueError(
            f"dropout {p} rounds to {t}/{STEPS}, which drops {effect}; use 0 or a p between"
        )
    return t


def scale(p: float) -> float:
    """The factor on kept elements: the exact inverse of the share that is kept."""
    return STEPS / (STEPS - threshold(p))


def words(seed: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each counter, as int64.

    seed int64 [1] in [0, 2⁶³), counter int64 [n]
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2⁶⁴, so the masked arithmetic shift is the unsigned high word.
        from_c0, from_c2 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0 = (from_c2 >> 32).bitwise_and_(_LOW).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (from_c0 >> 32).bitwise_and_(_LOW).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = from_c2.bitwise_and_(_LOW), from_c0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: torch.Tensor, p: float, rows: slice, K: int) -> torch.Tensor:
    """The mask of kept elements, bool [rows, K], for these rows of the flattened activation."""
    groups = -(-K // GROUP)
    start, stop = rows.start * groups, rows.stop * groups
    counter = torch.arange(start, stop, dtype=torch.int64, device=seed.device)
    w0, w1, w2, w3 = words(seed, counter)
    # The order in which a kernel that joins the words pairwise has them in registers, low half
    # first.
    halves = torch.stack((w0, w0 >> 16, w2, w2 >> 16, w1, w1 >> 16, w3, w3 >> 16), dim=-1)
    kept = (halves & 0xFFFF) >= threshold(p)
    return kept.view(rows.stop - rows.start, groups * GROUP)[:, :K]


def differentiable_drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """mask⊙x·scale, out of place and on plain autograd; a dropped NaN is 0.  x [...,K]"""
    mask = keep_mask(seed, p, slice(0, tokens(x)), x.shape[-1]).view(x.shape)
    return torch.where(mask, x * scale(p), 0.0)


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """drop(x) without autograd, and without a mask or an fp32 copy of x's size.

    x [...,K] -> fresh, contiguous
    """
    out, x2 = x.new_empty(x.shape), flatten_tokens(x)
    out2 = out.view(x2.shape)
    for rows in row_blocks(x2):
        mask = keep_mask(seed, p, rows, x.shape[-1])
        out2[rows] = torch.where(mask, x2[rows] * scale(p), 0.0)
    return out


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed, int64 [1] on the device, from torch's own generator there."""
    return torch.randint(2**63 - 1, (1,), device=device)

"""The dropout bits: Philox-4x32-7, a pure function of (seed, row, column).

One call gives the bits of 8 neighbouring columns as 16-bit halves. Every backend must drop exactly
these elements. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

keep_mask computes them from 32-bit words, some rows at a time; a program that is being traced gets
the same bits from a chain of int64 operations, which Inductor makes one kernel of.
"""

from __future__ import annotations

import itertools

import torch

from lorafast.engine.problem import tokens
from lorafast.engine.row_blocks import flatten_tokens, row_blocks
from lorafast.runtime import torch_internals

ROUNDS = 7
GROUP = 8
# A half has 16 bits: probabilities are multiples of 1/65536.
STEPS = 65536
_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# The signed int32 and the 32-bit words that differ in the top bit of each half.
_TOP_BITS = 0x80008000 - (1 << 32)
# Calls whose words are computed at once, with 48 bytes of temporaries each: on a CPU they stay in
# cache; elsewhere they hide the launches, and are few beside the activations of a large layer.
CPU_CALLS = 1 << 16
CALLS = 1 << 20


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


def keep_mask(seed: torch.Tensor, p: float, rows: slice, K: int) -> torch.Tensor:
    """The mask of kept elements, bool [rows, K], for these rows of the flattened activation.

    seed int64 [1] in [0, 2⁶³)
    """
    if _is_traced(seed):
        return _traced_mask(seed, p, rows, K)
    groups = -(-K // GROUP)
    mask = torch.empty(rows.stop - rows.start, K, dtype=torch.bool, device=seed.device)
    if not mask.numel():
        return mask
    keys = _round_keys(seed)
    # As signed numbers, halves with their top bit flipped are in the order of the unsigned ones.
    limit = threshold(p) - STEPS // 2
    step = _rows_at_once(seed, groups)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        halves = _flipped_words(keys, start * groups, stop * groups).view(torch.int16)
        halves = halves.view(stop - start, groups * GROUP)[:, :K]
        torch.ge(halves, limit, out=mask[start - rows.start : stop - rows.start])
    return mask


def _round_keys(seed: torch.Tensor) -> torch.Tensor:
    """The keys of all rounds, int32 [ROUNDS,2,1], which wrap as the unsigned ones do."""
    # A view as int32 needs a stride of 1, which a slice of many seeds lacks.
    low, high = seed.as_strided((1,), (1,)).view(torch.int32).unbind()
    rounds = torch.arange(ROUNDS, dtype=torch.int32, device=seed.device)
    weyl = [constant - (1 << 32) for constant in _WEYL]
    keys = [torch.add(key, rounds, alpha=step) for key, step in zip((low, high), weyl, strict=True)]
    return torch.stack(keys, dim=1)[..., None]


def _flipped_words(keys: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The words of the counters [start, stop), int32 [n,4], with the top bit of each half flipped.

    They lie in the order w0, w2, w1, w3, low half first: that of a kernel's registers after it has
    joined the words pairwise.
    """
    # A piece has counters with one high word.
    edges = [start, *range(((start >> 32) + 1) << 32, stop, 1 << 32), stop]
    pieces = [_piece(keys, first, end - first) for first, end in itertools.pairwise(edges)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _piece(keys: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """_flipped_words of counters that differ in their low word alone."""
    c = torch.zeros(2, count, dtype=torch.int64, device=keys.device)
    torch.arange(start & _LOW, (start & _LOW) + count, out=c[0])
    return _rounds(keys, c, start >> 32)


def _rounds(keys: torch.Tensor, c: torch.Tensor, high: int | torch.Tensor) -> torch.Tensor:
    """_flipped_words of counters with the low words c[0], and high ones, [n] or one for all.

    c is int64 [2,n], c[1] is 0, and both are overwritten: they are c0 and c2, whose high half of 0
    makes one multiplication give both words of a product. Those are read in place, as int32: on
    every device of torch the low word comes first.
    """
    count, device = c.shape[1], keys.device
    c_words = c.view(torch.int32)
    c_low = c_words.view(2, count, 2)[..., 0]
    # The products of a round and of the one before it: from c2, from c0.
    products = torch.empty(2, 2, count, dtype=torch.int64, device=device)
    words = products.view(torch.int32).view(2, 2, count, 2)
    # c1 of the first round is the counters' high word, and c3 is 0.
    wide = count if isinstance(high, torch.Tensor) else 1
    before = torch.zeros(2, wide, dtype=torch.int32, device=device)
    before[0] = high
    for i, key in enumerate(keys):
        low, top = words[i % 2].unbind(-1)
        torch.mul(c[1], _MULTIPLY[1], out=products[i % 2, 0])
        torch.mul(c[0], _MULTIPLY[0], out=products[i % 2, 1])
        if i < len(keys) - 1:
            torch.bitwise_xor(top, before, out=c_low).bitwise_xor_(key)
            before = low
    # c has been read for the last time.
    result = c_words.view(count, 4)
    torch.bitwise_xor(top, before, out=result[:, :2].t()).bitwise_xor_(keys[-1] ^ _TOP_BITS)
    torch.bitwise_xor(low, _TOP_BITS, out=result[:, 2:].t())
    return result


def _is_traced(seed: torch.Tensor) -> bool:
    """True if operations on the seed are recorded or transformed, which those in place suit ill."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch_internals.transforms_active()
        or type(seed) is not torch.Tensor
    )


def words(seed: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each counter, as int64, without operations in place.

    seed int64 [1] in [0, 2⁶³), counter int64 [n]
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2⁶⁴, so the masked arithmetic shift is the unsigned high word.
        from_c0, from_c2 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0 = ((from_c2 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((from_c0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = from_c2 & _LOW, from_c0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask_of_rows(seed: torch.Tensor, p: float, rows: torch.Tensor, K: int) -> torch.Tensor:
    """The mask of kept elements, bool [S,K], for rows with any indices, int64 [S]."""
    groups, S = -(-K // GROUP), rows.shape[0]
    group = torch.arange(groups, dtype=torch.int64, device=seed.device)
    if _is_traced(seed):
        return _mask_of_counters(seed, p, (rows[:, None] * groups + group).view(-1), K)
    mask = torch.empty(S, K, dtype=torch.bool, device=seed.device)
    if not mask.numel():
        return mask
    keys, limit, step = _round_keys(seed), threshold(p) - STEPS // 2, _rows_at_once(seed, groups)
    for start in range(0, S, step):
        counter = (rows[start : start + step, None] * groups + group).view(-1)
        c = torch.zeros(2, counter.shape[0], dtype=torch.int64, device=seed.device)
        torch.bitwise_and(counter, _LOW, out=c[0])
        halves = _rounds(keys, c, counter >> 32).view(torch.int16)
        halves = halves.view(-1, groups * GROUP)[:, :K]
        torch.ge(halves, limit, out=mask[start : start + step])
    return mask


def _rows_at_once(seed: torch.Tensor, groups: int) -> int:
    """The rows of so many calls each whose words are computed at once."""
    return max(1, (CPU_CALLS if seed.device.type == "cpu" else CALLS) // groups)


def _traced_mask(seed: torch.Tensor, p: float, rows: slice, K: int) -> torch.Tensor:
    """keep_mask without operations in place and without a loop over rows."""
    groups = -(-K // GROUP)
    start, stop = rows.start * groups, rows.stop * groups
    counter = torch.arange(start, stop, dtype=torch.int64, device=seed.device)
    return _mask_of_counters(seed, p, counter, K)


def _mask_of_counters(seed: torch.Tensor, p: float, counter: torch.Tensor, K: int) -> torch.Tensor:
    """The mask, bool [S,K], of the counters of all calls of S whole rows."""
    groups = -(-K // GROUP)
    w0, w1, w2, w3 = words(seed, counter)
    halves = torch.stack((w0, w0 >> 16, w2, w2 >> 16, w1, w1 >> 16, w3, w3 >> 16), dim=-1)
    kept = (halves & 0xFFFF) >= threshold(p)
    return kept.view(-1, groups * GROUP)[:, :K]


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

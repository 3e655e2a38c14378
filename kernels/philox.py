"""The dropout bits inside a Triton kernel, equal to lorafast/engine/philox.py bit for bit."""

import triton
import triton.language as tl

# A kernel may read a global only if it is a constexpr.
ROUNDS = tl.constexpr(7)


@triton.jit
def keep_tile(seed, rows, first_group, groups, threshold, GROUPS: tl.constexpr):
    """Return the keep mask of GROUPS·8 columns from column 8·first_group on.

    rows int64 [BLOCK_M] -> bool [BLOCK_M, GROUPS·8]. groups is ceil(K/8) of the whole row, so that
    the counter is that of the flattened activation, whatever the tiling.
    """
    counter = rows[:, None] * groups + (first_group + tl.arange(0, GROUPS))[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter.to(tl.int64), ROUNDS)
    # Pairwise joins put the words in the order w0, w2, w1, w3, the low half of each first.
    low = tl.join(tl.join(_half(w0, 0), _half(w1, 0)), tl.join(_half(w2, 0), _half(w3, 0)))
    high = tl.join(tl.join(_half(w0, 16), _half(w1, 16)), tl.join(_half(w2, 16), _half(w3, 16)))
    halves = tl.join(low, high)  # [BLOCK_M, GROUPS, 2 (w0|w1), 2 (w0|w2), 2 (low|high)]
    return halves.reshape(rows.shape[0], GROUPS * 8) >= threshold


@triton.jit
def _half(word, shift: tl.constexpr):
    return (word.to(tl.uint32, bitcast=True) >> shift) & 0xFFFF

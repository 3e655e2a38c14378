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
    word = _words(seed, rows, first_group, groups, GROUPS)
    # A half at the top of a word is at least t if the word is at least t·2¹⁶, whatever lies below.
    least = tl.cast(threshold, tl.uint32) << 16
    return tl.join((word << 16) >= least, word >= least).reshape(rows.shape[0], GROUPS * 8)


@triton.jit
def drop_tile(x, seed, rows, first_group, groups, threshold, GROUPS: tl.constexpr):
    """Return x [BLOCK_M, GROUPS·8] with dropped elements as zeros, unscaled; see keep_tile."""
    if x.dtype.primitive_bitwidth == 16:
        # Both halves of a word are compared at once, and the compiler masks x by pairs too.
        mask = _mask_words(_words(seed, rows, first_group, groups, GROUPS), threshold)
        pair = tl.join((mask & 0xFFFF).to(tl.uint16), (mask >> 16).to(tl.uint16))
        bits = x.to(tl.uint16, bitcast=True) & pair.reshape(rows.shape[0], GROUPS * 8)
        kept = bits.to(x.dtype, bitcast=True)
    else:
        kept = tl.where(keep_tile(seed, rows, first_group, groups, threshold, GROUPS), x, 0.0)
    return kept


@triton.jit
def _words(seed, rows, first_group, groups, GROUPS: tl.constexpr):
    """Return the words of GROUPS calls a row in the order of their columns, low half first.

    uint32 [BLOCK_M, GROUPS·4]
    """
    counter = rows[:, None] * groups + (first_group + tl.arange(0, GROUPS))[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter.to(tl.int64), ROUNDS)
    # Pairwise joins put the words in the order w0, w2, w1, w3.
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return words.reshape(rows.shape[0], GROUPS * 4).to(tl.uint32, bitcast=True)


@triton.jit
def _mask_words(word, threshold):
    """Return 0xFFFF in each half of a word that is at least the threshold, and 0 in the others."""
    least = tl.cast(threshold, tl.uint32) * 0x10001
    # The difference of the low 15 bits of both halves. Their top bits, set, keep one half's borrow
    # out of the other, and remain set where nothing was borrowed.
    difference = (word | 0x80008000) - (least & 0x7FFF7FFF)
    below = least ^ 0xFFFFFFFF
    # At least: by the top bit alone where it differs from the threshold's, else by the difference.
    at_least = (word & below) | ((word ^ below) & difference)
    return ((at_least >> 15) & 0x00010001) * 0xFFFF

"""Operands in several layouts, dropout by torch, and the error rule, for the Triton tests."""

import torch

from lorafast import testing
from lorafast.engine import philox

SEED, P = torch.tensor([1234567890123]), 0.3
DTYPES = [torch.float32, torch.float16]


def strided(M, K, dtype, layout):
    """Return normal numbers [M,K]: contiguous, a slice of a wider matrix, or a transposed [K,M]."""
    if layout == "transposed":
        return torch.randn(K, M, dtype=torch.float64).to(dtype).t()
    wide = torch.randn(M, K + 3, dtype=torch.float64).to(dtype)
    return wide[:, 1 : K + 1] if layout == "sliced" else wide[:, :K].contiguous()


def within_twice(ours, eager, truth, dtype):
    """Assert the error rule over several draws: our error is at most twice that of stock torch.

    ours, eager, truth: lists of results, ours, stock torch's and those in float64.
    """
    errors = [
        sum((a.double() - t).square().sum() for a, t in zip(results, truth, strict=True)) ** 0.5
        for results in (ours, eager)
    ]
    scale = sum(t.square().sum() for t in truth) ** 0.5
    ratio = testing.ratio(*(float(e) for e in errors), float(scale), torch.finfo(dtype).eps / 8)
    assert ratio <= 2, ratio


def draws(numbers):
    """Return the draws over which an error is measured.

    There are more of them for a result of few numbers, because the rounding of one says nothing.
    """
    return range(2 if numbers >= 64 else 32)


def far_apart(folder, rows, width):
    """Return fp16 numbers [rows,width] twice: with rows 2²⁷ elements apart, and contiguous.

    The last rows of the first lie beyond element 2³¹.
    """
    apart = 1 << 27
    # The file is sparse: only pages that are written take space.
    whole = torch.from_file(
        str(folder / "sparse"), shared=True, size=rows * apart, dtype=torch.float16
    )
    far, near = whole.as_strided((rows, width), (apart, 1)), torch.randn(rows, width).half()
    far.copy_(near)
    return far, near


def dropped(x, p):
    """Return drop(x) by torch, with the seed of these tests."""
    if not p:
        return x
    return x * philox.keep_mask(SEED, p, slice(0, x.shape[0]), x.shape[1]) * philox.scale(p)

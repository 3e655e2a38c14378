"""What the tests of the Triton kernels share: operands that lie every way, dropout by torch, and the error rule over draws."""

import torch

from lorafast import testing
from lorafast.engine import philox

SEED, P = torch.tensor([1234567890123]), 0.3
DTYPES = [torch.float32, torch.float16]


def strided(M, K, dtype, layout):
    """[M,K] of normal numbers: contiguous, a slice of something wider, or the transpose of [K,M]."""
    if layout == "transposed":
        return torch.randn(K, M, dtype=torch.float64).to(dtype).t()
    wide = torch.randn(M, K + 3, dtype=torch.float64).to(dtype)
    return wide[:, 1 : K + 1] if layout == "sliced" else wide[:, :K].contiguous()


def within_twice(found, eager, truth, dtype):
    """The error rule over several draws: lists of results, and what stock torch and float64 give."""
    errors = [
        sum((a.double() - t).square().sum() for a, t in zip(some, truth, strict=True)) ** 0.5
        for some in (found, eager)
    ]
    scale = sum(t.square().sum() for t in truth) ** 0.5
    ratio = testing.ratio(*(float(e) for e in errors), float(scale), torch.finfo(dtype).eps / 8)
    assert ratio <= 2, ratio


def draws(numbers):
    """How many problems an error is taken over: where a result is a number or two, the rounding of one says nothing."""
    return range(2 if numbers >= 64 else 32)


def far_apart(folder, rows, width):
    """The same fp16 numbers twice [rows,width]: with rows 2²⁷ elements apart, the last beyond the 2³¹-st, and close together."""
    apart = 1 << 27
    # A file with holes: only what is touched takes room.
    whole = torch.from_file(
        str(folder / "sparse"), shared=True, size=rows * apart, dtype=torch.float16
    )
    far, near = whole.as_strided((rows, width), (apart, 1)), torch.randn(rows, width).half()
    far.copy_(near)
    return far, near


def dropped(x, p):
    """drop(x) by torch, with the seed of these tests."""
    return x * philox.kept(SEED, p, slice(0, x.shape[0]), x.shape[1]) * philox.scale(p) if p else x

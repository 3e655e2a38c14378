"""Layers for the emulator: every form once, in one dtype, with dropout or without."""

from collections.abc import Iterator

import torch

from lorafast import testing

# M, N, K and R.
SIZES = (
    (63, 72, 136, 8), (17, 130, 72, 12), (64, 136, 128, 16), (33, 257, 130, 24), (130, 64, 72, 64),
    (1, 72, 64, 4),
)  # fmt: skip
QUICK = 90, testing.Case(testing.FORMS[0], 33, 72, 136, 8, torch.bfloat16, 0.3)


def every_form(*dtypes: torch.dtype) -> Iterator[tuple[int, int, testing.Case]]:
    """Yield the number, the capability and the case of every form; the dtypes turn."""
    for i, form in enumerate(testing.FORMS):
        dtype, p = dtypes[i % len(dtypes)], (0.3, 0.0)[i // 2 % 2]
        sizes, transposed = SIZES[i % len(SIZES)], i % 4 == 3
        case = testing.Case(form, *sizes, dtype, p, bias=i % 3 != 1, transposed=transposed)
        yield i, (90, 80)[i % 2], case if case.works else testing.Case(form, *sizes, dtype)

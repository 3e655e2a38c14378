"""Dropout as compiled for a GPU, where pairs of 16-bit numbers are masked at once: every bit."""

from unittest import mock

import pytest
import torch

from emulator import driver
from emulator.process import in_emulator
from lorafast.engine import philox
from lorafast.engine.kernels import launch
from lorafast.engine.kernels.drop import drop

# M, K, the distance of x's rows, seed, p and the first row. The first two are aligned, the others
# are not, and a threshold of 1 is compiled as a constant.
CASES = [
    (70, 272, 272, 2**63 - 2, 0.05, 0),
    (33, 256, 512, 2**32 + 5, 0.5, 2**31 - 40),
    (35, 131, 133, 0, 1 / 65536, 2**32 - 9),
]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (90, torch.bfloat16),
        pytest.param(80, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(90, torch.float16, marks=pytest.mark.slow),
    ],
)
@in_emulator
def test_drop_is_torchs_bit_for_bit(capability, dtype):
    for M, K, apart, seed, p, first_row in CASES:
        seed = torch.tensor([seed])
        kept = philox.keep_mask(seed, p, slice(first_row, first_row + M), K)
        x = torch.randn(M, apart).to(dtype)[:, :K]
        x.masked_fill_(~kept, torch.nan)
        dropped, added = torch.empty(M, K, dtype=dtype), torch.ones(M, K, dtype=dtype)
        part = torch.randn(M, K)
        with driver.emulating(capability):
            drop(dropped, x, seed, p, first_row)
            drop(added, part, seed, p, first_row, scaled=False, accumulate=True)
        assert torch.equal(dropped, torch.where(kept, x * philox.scale(p), 0.0))
        assert torch.equal(added, (1 + torch.where(kept, part, 0.0)).to(dtype))


@in_emulator
def test_a_kept_kernel_drops_what_it_is_launched_for():
    """The same compiled kernel with other tensors, rows and seeds, and no binder before it."""
    from triton.runtime.jit import JITFunction

    p, K, noted = 0.05, 256, mock.Mock(side_effect=JITFunction.run)
    bound = mock.patch.object(JITFunction, "run", lambda *args, **options: noted(*args, **options))
    launch._arguments.clear()
    with driver.emulating(90), bound:
        for M, first_row, seed in ((40, 0, 3), (33, 7, 2**40), (1, 100, 5)):
            seed = torch.tensor([seed])
            x, out = torch.randn(M, K).bfloat16(), torch.empty(M, K, dtype=torch.bfloat16)
            drop(out, x, seed, p, first_row)
            kept = philox.keep_mask(seed, p, slice(first_row, first_row + M), K)
            assert torch.equal(out, torch.where(kept, x * philox.scale(p), 0.0))
    assert noted.call_count == 1

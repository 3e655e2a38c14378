"""The C++ kernels' dropout bits, made visible in what they return."""

import torch

from helpers.integer_problems import assert_rounded_once, whole_numbers
from lorafast.engine import philox
from lorafast.engine.backends import cpu
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm

SEEDS = [0, 7, 2**32 + 5, 2**63 - 2]
# The first row and the width of a tile, so that the counter's low word runs over within a row and
# between two; and where the row's own number does.
ROWS = [
    (2**32 // 125 - 9, 1000),
    (2**32 // 257 - 3, 2050),
    (2**32 - 7, 5),
    (2**31 - 5, 64),
    (2**33, 1),
    (2**40 + 12345, 129),
]
ALL = slice(None)


def assert_masks(backend, seed, p, M, K, dtype):
    """Check that the three primitives with dropout drop the right elements and scale the others."""
    kept = philox.keep_mask(seed, p, slice(0, M), K).float() * torch.tensor(philox.scale(p))
    x, columns = torch.ones(M, K, dtype=dtype), torch.arange(0, K, -(-K // 256))
    A = torch.zeros(len(columns), K)
    A[torch.arange(len(columns)), columns] = 1
    assert_rounded_once(backend.project(x, [DownProj(A, None, seed, p)])[0][0], kept[:, columns])
    still = BaseTerm(torch.zeros(M, 1, dtype=dtype), torch.zeros(1, K, dtype=dtype))
    assert_rounded_once(
        backend.grad_input([still], [LowRankTerm(x[:, :1], torch.ones(1, K), seed, p)]), kept
    )
    rows = torch.arange(0, M, -(-M // 256))
    one_row = torch.zeros(M, len(rows), dtype=dtype)
    one_row[rows, torch.arange(len(rows))] = 1
    assert_rounded_once(
        backend.grad_project(x, [LowRankTerm(one_row, torch.empty(len(rows), K), seed, p)])[0],
        kept[rows],
    )


def assert_dropped(seed, m0, K, dtype):
    """Check drop of rows m0, m0 + 1, … of an activation, and that nothing else is written."""
    x, p = whole_numbers(21, K, dtype, "sliced"), 0.3
    groups = -(-K // 8)
    assert m0 > 2**31 - 22 or (m0 * groups < 2**32 < (m0 + 21) * groups and 2**32 % groups)
    out = torch.full((23, K), 7.0, dtype=dtype)
    cpu.library().drop(
        cpu.TYPES[dtype],
        x.data_ptr(),
        21,
        K,
        x.stride(0),
        seed.data_ptr(),
        philox.threshold(p),
        m0,
        out[1].data_ptr(),
        1,
    )
    kept = philox.keep_mask(seed, p, slice(m0, m0 + 21), K)
    assert_rounded_once(
        out[1:22], torch.where(kept, x.float() * torch.tensor(philox.scale(p)), 0.0), dtype
    )
    assert (out[::22] == 7).all()

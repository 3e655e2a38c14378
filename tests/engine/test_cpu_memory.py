"""Where the C++ kernels read and write: inside their operands and outputs, however far apart those lie, and nothing spreads."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import CHECKS, DTYPES, Guarded
from helpers.nan_spread import assert_spreads
from helpers.triton_interpreter import SEED, far_apart

from lorafast.engine import philox
from lorafast.engine.backends import cpu
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

pytestmark = needs_compiler
HALF = 0.5


@pytest.mark.parametrize(
    "shape", [(7, 130, 257, 12), (65, 1030, 35, 5), (150, 33, 1025, 33)], ids="M{0[0]}".format
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("primitive", CHECKS)
def test_nothing_is_written_beside_outputs_and_workspaces(primitive, dtype, shape):
    with Guarded() as guarded:
        CHECKS[primitive](cpu, DTYPES[dtype], torch.float32, *shape, "sliced")
    guarded.assert_whole()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_shows_where_it_is_used_and_nowhere_else(dtype):
    assert_spreads(DTYPES[dtype])


def test_what_is_infinite_and_dropped_stays_dropped():
    x = torch.where(philox.kept(SEED, HALF, slice(0, 70), 300), 1.0, float("inf"))
    low = LowRankTerm(torch.ones(70, 3), torch.ones(3, 300), SEED, HALF)
    for dtype in DTYPES.values():
        assert cpu.project(x.to(dtype), [DownProj(low.A, None, SEED, HALF)])[0][0].isfinite().all()
        assert cpu.grad_project(x.to(dtype), [low._replace(v=low.v.to(dtype))])[0].isfinite().all()


def test_rows_lie_beyond_two_to_the_thirty_first_element(tmp_path):
    rows, width = 20, 48
    (far, near), v = far_apart(tmp_path, rows, width), torch.randn(rows, 4).half()
    A, B, W = torch.randn(4, width), torch.randn(rows, 4), torch.randn(9, width).half()

    def everything(x):
        sums = cpu.grad_output(
            x, [UpProjGradSpec(A.t(), h=v, want_B=True)], None, x, want_bias=True
        )
        return [
            *cpu.project(x, [DownProj(A, None, SEED, HALF)])[0], cpu.grad_project(x, [LowRankTerm(v, A, SEED, HALF)])[0],
            cpu.row_norm(x, A, B), cpu.row_norm(x, A, B, axis="in"), *sums.adapters[0][:2], sums.d_bias, sums.dot,
            cpu.grad_input([BaseTerm(x, W.t(), torch.ones(width))], [LowRankTerm(x, W.t())]), cpu.linear(W, x, [UpProj(W, x)])[0],
        ]  # fmt: skip

    for one, other in zip(everything(far), everything(near), strict=True):
        assert torch.equal(one, other)

"""The cost models: flops against torch's counter on eager, bytes against the operands' sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorafast.engine.backends import eager
from lorafast.engine.kernels import cost
from lorafast.engine.problem import (
    PRIMITIVES,
    BaseTerm,
    DownProj,
    LowRankTerm,
    Problem,
    UpProj,
    UpProjGradSpec,
)
from lorafast.runtime import devices

M, N, K, R = 8, 6, 10, 3
P = Problem(
    devices.Arch("cpu", "cpu"), torch.float32, M, K, (N,), (R,), torch.float32, torch.float32
)


def addmm_in_place(_, a, b, out_shape=None, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def gemm_flops(call):
    # torch's counter has addmm but not addmm_.
    mapping = {torch.ops.aten.addmm_: addmm_in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def test_flops():
    x, W, A, B, h = (
        torch.randn(M, K),
        torch.randn(N, K),
        torch.randn(R, K),
        torch.randn(N, R),
        torch.randn(M, R),
    )
    dy, full = torch.randn(M, N), torch.randn(R, R)
    assert cost.project(P).flops == gemm_flops(lambda: eager.project(x, [DownProj(A)]))
    with_core = Problem(
        P.arch, P.dtype, M, K, (N,), (R,), P.weight_dtype, P.factor_dtype, core="full"
    )
    assert cost.project(with_core).flops == gemm_flops(
        lambda: eager.project(x, [DownProj(A, full)])
    )
    assert cost.linear(P).flops == gemm_flops(lambda: eager.linear(x, W, [UpProj(h, B)]))
    assert cost.grad_output(P).flops == gemm_flops(
        lambda: eager.grad_output(dy, [UpProjGradSpec(B, h=h, want_B=True)])
    )
    spec = UpProjGradSpec(B, core=full, h=h, want_B=True, want_core=True)
    assert cost.grad_output(with_core).flops == gemm_flops(lambda: eager.grad_output(dy, [spec]))
    assert cost.grad_input(P).flops == gemm_flops(
        lambda: eager.grad_input([BaseTerm(dy, W)], [LowRankTerm(h, A)])
    )
    assert cost.grad_project(P).flops == gemm_flops(
        lambda: eager.grad_project(x, [LowRankTerm(h, A)])
    )
    squares = 2 * N * K
    assert cost.row_norm(P).flops == gemm_flops(lambda: eager.row_norm(W, A, B)) + squares


def test_bytes():
    assert cost.linear(P).bytes == 4 * (M * K + M * N + M * R + N * K + N * R)
    assert cost.row_norm(P).bytes == 4 * (N * K + R * (N + K) + N)


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_every_primitive_has_a_cost(primitive):
    assert getattr(cost, primitive)(P).bytes > 0

"""The six primitives of the eager backend, lists and strides, against float64 written out here."""

import pytest
import torch

from lorafast.engine import philox, row_blocks
from lorafast.engine.backends import eager
from lorafast.engine.problem import (
    BaseTerm,
    CallOptions,
    DownProj,
    LayerTensors,
    LowRankTerm,
    OutputGrads,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
)
from lorafast.nn import merge_math

M, N, K = 9, 7, 10
RANKS = (1, 4)
SEED = torch.tensor([1234])
P = 0.4


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def mask(rows=M, width=K):
    return philox.keep_mask(SEED, P, slice(0, rows), width).double() * philox.scale(P)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_project_takes_several_adapters_on_one_x():
    x = normal(3, 3, 2 * K)[..., ::2]
    flat = x.reshape(M, K)
    A, core, diagonal = [normal(r, K) for r in RANKS], normal(4, 4), normal(1)
    (h0, m0), (h1, m1) = eager.project(x, [DownProj(A[0], diagonal, SEED, P), DownProj(A[1], core)])
    close(h0, (flat * mask()) @ A[0].t())
    close(m0, h0 * diagonal)
    close(h1, flat @ A[1].t())
    close(m1, h1 @ core.t())


def test_linear_adds_several_adapters():
    x, W, b = normal(3, 3, K), normal(N, K), normal(N)
    h, B, scale, gain = (
        [normal(M, r) for r in RANKS],
        [normal(N, r) for r in RANKS],
        normal(N),
        normal(N),
    )
    ups = [UpProj(h[0], B[0], 0.5), UpProj(h[1], B[1], 2.0, scale)]
    z = x.reshape(M, K) @ W.t() + 0.5 * h[0] @ B[0].t() + 2 * h[1] @ B[1].t() * scale
    y, none = eager.linear(x, W, ups, bias=b)
    close(y.reshape(M, N), z + b)
    assert none is None
    y, inner = eager.linear(x, W, ups, gain, b, keep_inner=True)
    close(y.reshape(M, N), z * gain + b)
    close(inner, z)
    close(eager.linear(x, W, [])[0].reshape(M, N), x.reshape(M, K) @ W.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.randn(N)])
def test_a_gain_of_one_is_the_frozen_layer_bit_for_bit(dtype, bias):
    # More terms than a BLAS adds in one go, so that the order of the sum shows.
    x, W, low = (
        torch.randn(M, 1000).to(dtype),
        torch.randn(N, 1000).to(dtype),
        UpProj(torch.randn(M, 2).to(dtype), torch.zeros(N, 2)),
    )
    bias = None if bias is None else bias.to(dtype)
    want = torch.nn.functional.linear(x, W, bias)
    for keep_inner in (False, True):
        y, z = eager.linear(x, W, [low], torch.ones(N), bias, keep_inner)
        assert torch.equal(y, want)
        assert (z is not None) == keep_inner
    assert z.dtype == dtype
    assert z.data_ptr() != y.data_ptr()
    torch.testing.assert_close(z, torch.nn.functional.linear(x, W))


def test_grad_output_serves_several_adapters_in_one_call():
    dy, kept, gain = normal(3, 3, N), normal(M, N), normal(N)
    flat = dy.reshape(M, N)
    h, B, core, scale = (
        [normal(M, r) for r in RANKS],
        [normal(N, r) for r in RANKS],
        normal(4, 4),
        normal(N),
    )
    asked = [
        UpProjGradSpec(B[0], 0.5, None, None, h[0], want_v=True, want_B=True),
        UpProjGradSpec(
            B[1],
            2.0,
            scale,
            core,
            h[1],
            3,
            want_v=True,
            want_B=True,
            want_core=True,
            want_out_scale=True,
        ),
    ]
    got = eager.grad_output(dy, asked, gain, kept, want_bias=True)
    close(got.d_bias, flat.sum(0))
    close(got.dot, (flat * kept).sum(0))
    close(got.adapters[0].v, 0.5 * (flat * gain) @ B[0])
    close(got.adapters[0].dB, 0.5 * (flat * gain).t() @ h[0])
    u = 2 * (flat * gain * scale) @ B[1]
    P_ = 2 * (flat * gain).t() @ (h[1] @ core.t())
    close(got.adapters[1].v, u @ core)
    close(got.adapters[1].d_core, u.t() @ h[1])
    close(got.adapters[1].d_out_scale, (P_ * B[1]).sum(1))
    close(
        got.adapters[1].dB,
        torch.cat((torch.zeros(N, 3, dtype=torch.float64), (P_ * scale[:, None])[:, 3:]), 1),
    )
    nothing = eager.grad_output(dy, [UpProjGradSpec(B[0], want_v=False)])
    assert nothing == OutputGrads([UpProjGrads(None, None, None, None)], None, None)


def test_grad_input_sums_segments_and_masked_adapters():
    dys, Ws, gain = [normal(3, 3, n) for n in (N, 5)], [normal(N, K), normal(5, K)], normal(N)
    v, A = [normal(M, r) for r in RANKS], [normal(r, K) for r in RANKS]
    lows = [
        LowRankTerm(v[0], A[0], SEED, P),
        LowRankTerm(v[1], A[1]),
        LowRankTerm(v[0], A[0], SEED, P),
    ]
    got = eager.grad_input([BaseTerm(dys[0], Ws[0], gain), BaseTerm(dys[1], Ws[1])], lows)
    want = (
        (dys[0].reshape(M, N) * gain) @ Ws[0]
        + dys[1].reshape(M, 5) @ Ws[1]
        + 2 * mask() * (v[0] @ A[0])
        + v[1] @ A[1]
    )
    close(got.reshape(M, K), want)
    many_rows = normal(50, N)
    close(eager.grad_input([BaseTerm(many_rows, Ws[0], gain)], []), (many_rows * gain) @ Ws[0])


def test_grad_project_serves_several_adapters():
    x, v = normal(M, 2 * K)[:, :K], [normal(M, r) for r in RANKS]
    got = eager.grad_project(
        x, [LowRankTerm(v[0], normal(1, K), SEED, P), LowRankTerm(v[1], normal(4, K))]
    )
    close(got[0], v[0].t() @ (x * mask()))
    close(got[1], v[1].t() @ x)


def test_panels_do_not_show(monkeypatch):
    x, v, A, W, B = normal(M, K), normal(M, 4), normal(4, K), normal(N, K), normal(N, 4)
    calls = (
        lambda: eager.project(x, [DownProj(A, None, SEED, P)])[0][0],
        lambda: eager.grad_input([BaseTerm(normal(M, N) * 0 + 1, W)], [LowRankTerm(v, A, SEED, P)]),
        lambda: eager.grad_project(x, [LowRankTerm(v, A, SEED, P)])[0],
        lambda: philox.drop(x, SEED, P),
        lambda: eager.row_norm(W, A, B, 0.5),
        lambda: eager.row_norm(W, A, B, 0.5, "in"),
        lambda: (
            eager.grad_output(
                normal(M, N) * 0 + 1, [], kept=torch.ones(M, N, dtype=torch.float64)
            ).dot
        ),
    )
    whole = [call() for call in calls]
    monkeypatch.setattr(row_blocks, "CPU_ELEMENTS", 2 * K)
    monkeypatch.setattr(eager, "_SUM_ROWS", 2)
    for call, want in zip(calls, whole, strict=True):
        close(call(), want)


def test_panels_do_not_show_in_a_fold(monkeypatch):
    t = LayerTensors(
        normal(N, K), lora_A=normal(4, K), lora_B=normal(N, 4), magnitude=normal(N).abs() + 1
    )
    t = t._replace(norm=eager.row_norm(t.weight, t.lora_A, t.lora_B, 0.5))
    whole = merge_math.merged_weight(t, CallOptions(0.5))
    close(whole, (t.magnitude / t.norm)[:, None] * (t.weight + 0.5 * t.lora_B @ t.lora_A))
    monkeypatch.setattr(row_blocks, "CPU_ELEMENTS", 2 * K)
    close(merge_math.merged_weight(t, CallOptions(0.5)), whole)
    close(merge_math.unmerged_weight(t._replace(weight=whole), CallOptions(0.5)), t.weight)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_norm(axis, dtype):
    W, A, B = normal(N, K).to(dtype), normal(4, K), normal(N, 4)
    got = eager.row_norm(W, A, B, 0.7, axis)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = (W.double() + 0.7 * B @ A).norm(dim=1 if axis == "out" else 0)
    torch.testing.assert_close(
        got.double(), want, rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=0
    )


def test_row_norm_sums_in_fp32_what_overflows_in_fp16():
    W = torch.full((2, 1000), 200.0, dtype=torch.float16)
    norm = eager.row_norm(W, torch.zeros(1, 1000), torch.zeros(2, 1))
    assert torch.equal(norm, torch.full((2,), 200.0 * 1000**0.5))

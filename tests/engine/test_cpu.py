"""The C++ backend: every primitive to the bit where sums are exact, and under the error rule where they are not."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.cpp_compiler import needs_compiler
from helpers.integer_problems import (
    CHECKS,
    DTYPES,
    LAYOUTS,
    cores,
    drop,
    powers,
    returned,
    same,
    whole,
)
from helpers.triton_interpreter import SEED, P, draws, dropped, within_twice

from lorafast.engine.backends import cpu
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

pytestmark = needs_compiler
# M, N, K, R: ragged ends of every tile, one beyond every block, as few of everything as there can be; last, so many tokens that the
# sums over them are cut, and columns of which each task takes several blocks.
SHAPES = [
    (1, 1, 1, 1), (5, 17, 33, 3), (6, 255, 72, 4), (7, 130, 257, 12), (24, 31, 513, 17), (25, 512, 16, 2), (48, 1023, 8, 9),
    (49, 64, 1025, 33), (65, 1030, 130, 5), (128, 3, 256, 64), (129, 47, 65, 100), (3, 48, 20, 256), (900, 9, 1100, 6),
]  # fmt: skip
EMPTY = [(0, 3, 4, 2), (3, 0, 4, 2), (3, 4, 0, 2), (0, 0, 0, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "M{}-N{}-K{}-R{}".format(*shape))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("primitive", CHECKS)
def test_whole_numbers_to_the_bit(primitive, dtype, shape):
    turn = SHAPES.index(shape) + list(DTYPES).index(dtype)
    factor = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    CHECKS[primitive](cpu, DTYPES[dtype], factor, *shape, LAYOUTS[turn % len(LAYOUTS)])


@pytest.mark.parametrize("shape", EMPTY, ids=lambda shape: "M{}-N{}-K{}-R{}".format(*shape))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nothing_of_something(dtype, shape):
    for check in CHECKS.values():
        check(cpu, DTYPES[dtype], torch.float32, *shape, "sliced")


def project(dtype, M, N, K, R):
    x, A, core = torch.randn(M, K).to(dtype), torch.randn(R, K) / K**0.5, torch.randn(R, R) / R**0.5
    ((h, mixed),) = cpu.project(x, [DownProj(A, core, SEED, P)])

    def formula(cast):
        h = F.linear(dropped(x.to(cast), P).to(cast), A.to(cast))
        return h, F.linear(h, core.to(cast))

    return {"h": h, "mixed": mixed}, formula


def linear(dtype, M, N, K, R):
    x, W, B, h = (
        torch.randn(M, K).to(dtype),
        torch.randn(N, K).to(dtype),
        torch.randn(N, R),
        torch.randn(M, R).to(dtype),
    )
    gain, bias, out_scale = torch.rand(N) + 0.5, torch.randn(N), torch.randn(N)
    y, z = cpu.linear(x, W, [UpProj(h, B, 1.7, out_scale)], gain, bias, keep_inner=True)
    plain, _ = cpu.linear(x, W, [UpProj(h, B, 1.7), UpProj(h, B[:, :1].expand(N, R), -0.3)])

    def formula(cast):
        x_, W_, B_, h_, gain_, bias_, o_ = (t.to(cast) for t in (x, W, B, h, gain, bias, out_scale))
        z = F.linear(x_, W_) + 1.7 * (o_ * F.linear(h_, B_))
        both = (
            F.linear(x_, W_) + 1.7 * F.linear(h_, B_) - 0.3 * F.linear(h_, B_[:, :1].expand(N, R))
        )
        return gain_ * z + bias_, z, both

    return {"y": y, "z": z, "plain": plain}, formula


def grad_output(dtype, M, N, K, R):
    dy, kept, h = (
        torch.randn(M, N).to(dtype),
        torch.randn(M, N).to(dtype),
        torch.randn(M, R).to(dtype),
    )
    B, gain, core = torch.randn(N, R), torch.rand(N) + 0.5, torch.randn(R, R) / R**0.5
    out = cpu.grad_output(
        dy,
        [
            UpProjGradSpec(B, 1.7, h=h, want_B=True),
            UpProjGradSpec(B, 1.7, core=core, h=h, want_core=True),
        ],
        gain,
        kept,
        want_bias=True,
    )

    def formula(cast):
        dy_, kept_, h_, B_, gain_, core_ = (t.to(cast) for t in (dy, kept, h, B, gain, core))
        u = 1.7 * ((gain_ * dy_) @ B_)
        return (
            u,
            u @ core_,
            u.t() @ h_,
            1.7 * ((gain_ * dy_).t() @ h_),
            dy_.sum(0),
            (dy_ * kept_).sum(0),
        )

    plain, mixing = out.adapters
    return {
        "u": plain.v,
        "v": mixing.v,
        "d_core": mixing.d_core,
        "dB": plain.dB,
        "d_bias": out.d_bias,
        "dot": out.dot,
    }, formula


def grad_input(dtype, M, N, K, R):
    dy, W, v, A, gain = (
        torch.randn(M, N).to(dtype),
        torch.randn(N, K).to(dtype),
        torch.randn(M, R).to(dtype),
        torch.randn(R, K),
        torch.randn(N),
    )
    dx = cpu.grad_input([BaseTerm(dy, W, gain)], [LowRankTerm(v, A, SEED, P)])

    def formula(cast):
        return (
            (gain.to(cast) * dy.to(cast)) @ W.to(cast)
            + dropped(v.to(cast) @ A.to(cast), P).to(cast),
        )

    return {"dx": dx}, formula


def grad_project(dtype, M, N, K, R):
    x, v = torch.randn(M, K).to(dtype), torch.randn(M, R).to(dtype)
    (dA,) = cpu.grad_project(x, [LowRankTerm(v, torch.empty(R, K), SEED, P)])
    return {"dA": dA}, lambda cast: (v.to(cast).t() @ dropped(x.to(cast), P).to(cast),)


def row_norm(dtype, M, N, K, R):
    W, A, B = torch.randn(N, K).to(dtype), torch.randn(R, K), torch.randn(N, R)
    found = {axis: cpu.row_norm(W, A, B, torch.tensor(1.7), axis) for axis in ("out", "in")}
    return found, lambda cast: tuple(
        (W.to(cast) + 1.7 * (B.to(cast) @ A.to(cast))).norm(dim=dim) for dim in (1, 0)
    )


# What is summed in fp32 from what is given in the activation's dtype, and handed back so: held to fp32's own error.
SUMS = ("dA", "dB", "d_bias", "dot")


@pytest.mark.parametrize(
    ("M", "N", "K", "R"), [(1, 40, 72, 1), (70, 130, 257, 12), (300, 65, 1030, 33)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "made",
    [project, linear, grad_output, grad_input, grad_project, row_norm],
    ids=lambda made: made.__name__,
)
def test_the_error_rule(made, dtype, M, N, K, R):
    results = []
    for _ in draws(M * R):
        found, formula = made(DTYPES[dtype], M, N, K, R)
        results.append(
            (
                found,
                *(
                    dict(zip(found, formula(cast), strict=True))
                    for cast in (DTYPES[dtype], torch.float32, torch.float64)
                ),
            )
        )
    for name in found:
        ours, eager, single, truth = (
            [one[name] for one in some] for some in zip(*results, strict=True)
        )
        within_twice(
            ours,
            *((single, truth, torch.float32) if name in SUMS else (eager, truth, DTYPES[dtype])),
        )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("want_bias", [False, True])
def test_whatever_is_asked_of_dy_and_nothing_else(want_bias, kept, dtype):
    M, N, R = 13, 37, 5
    dy, h, B = (whole(*shape, DTYPES[dtype], "sliced", 7) for shape in ((M, N), (M, R), (N, R)))
    gain = powers(N) if want_bias else None
    for wants, core in itertools.product(
        itertools.product((False, True), repeat=4), cores(R, torch.float32)
    ):
        back = UpProjGradSpec(B, 0.5, powers(N), core, h, 2, *wants)
        back = back._replace(want_core=back.want_core and core is not None)
        sums = cpu.grad_output(dy, [back], gain, dy if kept else None, want_bias)
        returned(sums.adapters[0], dy, back, gain)
        assert (sums.d_bias is not None, sums.dot is not None) == (want_bias, kept)


def test_sums_without_an_adapter():
    dy = whole(13, 37, torch.bfloat16)
    sums = cpu.grad_output(dy, [], None, dy, want_bias=True)
    assert sums.adapters == []
    same(sums.d_bias, dy.double().sum(0), torch.float32)
    same(sums.dot, dy.double().square().sum(0), torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lies", ["dense", "permuted", "one number"])
def test_leading_dims_that_no_view_lays_flat(lies, dtype):
    def lying(width):
        x = whole(5 * width, 12, DTYPES[dtype], most=1).view(5, width, 12)
        return (
            x.permute(2, 0, 1)
            if lies == "permuted"
            else x.reshape(12, 5, width)
            if lies == "dense"
            else x[0, 0, 0].expand(12, 5, width)
        )

    x, dy = lying(33), lying(19)
    flat_x, flat_dy = x.reshape(60, 33), dy.reshape(60, 19)
    A, B, h, W = (
        whole(*shape, torch.float32, "sliced", 3) for shape in ((4, 33), (19, 4), (60, 4), (19, 33))
    )
    h, W = h.to(DTYPES[dtype]), W.to(DTYPES[dtype])
    back, low = UpProjGradSpec(B, h=h, want_B=True), LowRankTerm(h, A, SEED, 0.5)
    y, dx = cpu.linear(x, W, [UpProj(h, B)])[0], cpu.grad_input([BaseTerm(dy, W)], [low])
    assert (y.shape, dx.shape) == ((12, 5, 19), (12, 5, 33))
    assert all(
        one.is_contiguous() and one._base is None
        for one in (y, dx, cpu.linear(x, W, [], None, B[:, 0])[0])
    )
    same(y.view(60, 19), flat_x.double() @ W.double().t() + h.double() @ B.double().t())
    same(dx.view(60, 33), flat_dy.double() @ W.double() + 2 * drop(h.double() @ A.double(), 0.5))
    same(cpu.project(x, [DownProj(A)])[0][0], flat_x.double() @ A.double().t())
    same(cpu.grad_project(x, [low])[0], 2 * h.double().t() @ drop(flat_x, 0.5))
    sums = cpu.grad_output(dy, [back], None, dy, want_bias=True)
    returned(sums.adapters[0], flat_dy, back, None)
    same(sums.dot, flat_dy.double().square().sum(0))


def test_a_factor_in_float64_beside_one_that_is_not():
    """A problem tells the dtype of lora_A alone."""
    x, A, B, core = (
        whole(6, 20, torch.float32),
        whole(3, 20, torch.float32),
        whole(9, 3, torch.float64),
        whole(3, 3, torch.float64),
    )
    ((h, mixed),) = cpu.project(x, [DownProj(A, core)])
    same(mixed, h.double() @ core.t())
    W = whole(9, 20, torch.float32)
    same(cpu.linear(x, W, [UpProj(h, B)])[0], x.double() @ W.double().t() + h.double() @ B.t())
    back = UpProjGradSpec(B, core=core, h=whole(20, 3, torch.float32), want_B=True, want_core=True)
    returned(cpu.grad_output(W.t(), [back]).adapters[0], W.t(), back, None)
    same(cpu.row_norm(W, A, B), (W.double() + B @ A.double()).norm(dim=1))

"""grad_output in Triton's interpreter against float64, every result, in one pass and in two."""

import itertools

import pytest
import torch
from helpers.rotations import rotating, thinned
from helpers.triton_interpreter import DTYPES, far_apart, strided, within_twice

from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels import configs
from lorafast.engine.precision import apply_core, low_rank_grad_dtype
from lorafast.engine.problem import UpProjGradSpec

# M, N, R, and the layout of dy. Many ranks take two passes.
SHAPES = [
    (1, 72, 1, "contiguous"),
    (63, 130, 8, "transposed"),
    (17, 33, 12, "sliced"),
    (20, 40, 16, "transposed"),
    (70, 300, 24, "contiguous"),
    (65, 9, 64, "sliced"),
    (33, 70, 100, "transposed"),
]


def expected(dy, spec, gain, cast):
    """Return v, dB, d_core and d_out_scale of one adapter, computed by torch in a dtype."""
    s, B, h, dy = float(spec.scaling), spec.B.to(cast), spec.h.to(cast), dy.to(cast)
    core = None if spec.core is None else spec.core.to(cast)
    if gain is not None:
        dy = dy * gain.to(cast)
    scaled = B if spec.out_scale is None else spec.out_scale.to(cast)[:, None] * B
    u = s * (dy @ scaled)
    P = s * (dy.t() @ apply_core(h, core))
    dB = P.clone() if spec.out_scale is None else P * spec.out_scale.to(cast)[:, None]
    dB[:, : spec.frozen_columns] = 0
    v = u if core is None else u * core if core.dim() == 1 else u @ core
    d_core = None if core is None else (u * h).sum(0) if core.dim() == 1 else u.t() @ h
    return v, dB, d_core, (P * B).sum(1)


CORES_AND_EXTRAS = [
    (None, "plain"),
    (None, "gained"),
    ("diagonal", "scaled"),
    ("diagonal", "gained"),
    ("full", "tensor scaling"),
    ("full", "plain"),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "core", "extras"),
    thinned(
        (
            (dtype, shape, core, extras)
            for (dtype, shape), (core, extras) in rotating(
                # Every kind of core each time; and all six for every shape.
                itertools.product(DTYPES, SHAPES),
                CORES_AND_EXTRAS,
                count=3,
                step=2,
            )
        ),
        3,
    ),
)
def test_all_results_at_once(dtype, shape, core, extras):
    M, N, R, layout = shape
    ours, eager, truth = ([], [], [], []), ([], [], [], []), ([], [], [], [])
    for _ in range(32 if M * R < 16 else 2):
        dy, h = strided(M, N, dtype, layout), strided(M, R, dtype, layout)
        C = {None: None, "diagonal": torch.randn(R), "full": torch.randn(R, R) / R**0.5}[core]
        gain = torch.rand(N) + 0.5 if extras == "gained" else None
        out_scale = torch.randn(N) if extras == "scaled" else None
        spec = UpProjGradSpec(
            torch.randn(N, R),
            torch.tensor(1.7) if extras == "tensor scaling" else 1.7,
            out_scale,
            C,
            h,
            frozen_columns=0 if extras == "scaled" else R // 3,
            want_B=True,
            want_core=C is not None,
            want_out_scale=out_scale is not None,
        )
        kept = strided(M, N, dtype, layout)
        sums = backend.grad_output(dy, [spec], gain, kept, want_bias=True)
        (grads,) = sums.adapters
        assert grads.v.dtype == low_rank_grad_dtype(dtype)
        for draws, values in (
            (ours, grads),
            (eager, expected(dy, spec, gain, dtype)),
            (truth, expected(dy, spec, gain, torch.float64)),
        ):
            for draw, value in zip(draws, values, strict=True):
                draw.append(value)
        torch.testing.assert_close(sums.d_bias, dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            sums.dot, (dy.double() * kept.double()).sum(0).float(), rtol=1e-5, atol=1e-5
        )
    for i, name in enumerate(("v", "dB", "d_core", "d_out_scale")):
        if ours[i][0] is not None:
            assert name == "v" or ours[i][0].dtype == torch.float32
            within_twice(ours[i], eager[i], truth[i], dtype)
        else:
            assert (name == "d_core" and core is None) or (
                name == "d_out_scale" and extras != "scaled"
            )


@pytest.mark.parametrize("R", [8, 100])
@pytest.mark.parametrize("result", ["want_v", "want_B", "want_core", "want_out_scale"])
@pytest.mark.parametrize("want_bias", [False, True])
def test_each_result_alone_equals_the_one_among_all(result, R, want_bias):
    dy, h, core = torch.randn(40, 70), torch.randn(40, R), torch.randn(R, R)
    spec = UpProjGradSpec(
        torch.randn(70, R),
        2.0,
        torch.randn(70),
        core,
        h,
        want_B=True,
        want_core=True,
        want_out_scale=True,
    )
    whole = backend.grad_output(dy, [spec], want_bias=True)
    nothing = {"want_v": False, "want_B": False, "want_core": False, "want_out_scale": False}
    alone = backend.grad_output(
        dy, [spec._replace(**(nothing | {result: True}))], want_bias=want_bias
    )
    for name in ("v", "dB", "d_core", "d_out_scale"):
        one, other = getattr(alone.adapters[0], name), getattr(whole.adapters[0], name)
        assert (one is not None) == (
            result == {"v": "want_v", "dB": "want_B"}.get(name, f"want_{name[2:]}")
        )
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert (alone.d_bias is not None) == want_bias
    assert alone.dot is None


@pytest.mark.parametrize("ranks", [(3, 8, 4), (60, 8), (200, 100)])
def test_several_adapters_equal_each_one_alone(ranks):
    dy = torch.randn(40, 70)
    specs = [
        UpProjGradSpec(
            torch.randn(70, R), 0.5 + i, h=torch.randn(40, R), want_B=i != 1, want_v=i != 0
        )
        for i, R in enumerate(ranks)
    ]
    together = backend.grad_output(dy, specs, want_bias=True)
    torch.testing.assert_close(together.d_bias, dy.sum(0))
    for spec, grads in zip(specs, together.adapters, strict=True):
        (alone,) = backend.grad_output(dy, [spec]).adapters
        for one, other in zip(grads, alone, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_all_columns_frozen_and_sums_without_adapters():
    dy, h = torch.randn(9, 20), torch.randn(9, 4)
    (grads,) = backend.grad_output(
        dy, [UpProjGradSpec(torch.randn(20, 4), h=h, frozen_columns=4, want_B=True)]
    ).adapters
    assert torch.equal(grads.dB, torch.zeros(20, 4))
    sums = backend.grad_output(dy, [], kept=dy)
    assert sums.adapters == []
    assert sums.d_bias is None
    torch.testing.assert_close(sums.dot, dy.square().sum(0))


@pytest.mark.parametrize("M", [0, 1])
def test_no_tokens_and_one(M):
    dy, h = torch.randn(M, 20), torch.randn(M, 4)
    sums = backend.grad_output(
        dy, [UpProjGradSpec(torch.randn(20, 4), h=h, want_B=True)], want_bias=True
    )
    assert sums.adapters[0].v.shape == (M, 4)
    torch.testing.assert_close(sums.adapters[0].dB, dy.t() @ h)
    torch.testing.assert_close(sums.d_bias, dy.sum(0))


def test_an_expanded_dy_and_leading_dims():
    dy, h = torch.ones(()).expand(3, 5, 20), torch.randn(15, 4)
    spec = UpProjGradSpec(torch.randn(20, 4), h=h, want_B=True)
    for one, other in zip(
        backend.grad_output(dy, [spec]).adapters[0],
        backend.grad_output(torch.ones(15, 20), [spec]).adapters[0],
        strict=True,
    ):
        assert one is None if other is None else torch.equal(one, other)


def test_rows_beyond_element_two_to_the_31(tmp_path):
    rows, width = 20, 48
    far, near = far_apart(tmp_path, rows, width)
    spec = UpProjGradSpec(torch.randn(width, 4), h=torch.randn(rows, 4).half(), want_B=True)
    one, other = (backend.grad_output(dy, [spec], kept=dy) for dy in (far, near))
    assert torch.equal(one.adapters[0].v, other.adapters[0].v)
    assert torch.equal(one.adapters[0].dB, other.adapters[0].dB)
    assert torch.equal(one.dot, other.dot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_vectors_and_factors(dtype):
    """A factor that needs neither a cast nor a scale is read in place."""
    dy, h, B = (
        torch.randn(40, 70).to(dtype),
        torch.randn(40, 8).to(dtype),
        torch.randn(70, 16).to(dtype)[:, 3:11],
    )
    gain, out_scale = torch.rand(140)[::2], torch.rand(140)[::2]
    for extras in ({}, {"out_scale": out_scale}):
        for with_gain in (None, gain):
            spec = UpProjGradSpec(B, h=h, want_B=True, want_out_scale=bool(extras), **extras)
            dense = spec._replace(
                B=B.contiguous(), **{name: one.contiguous() for name, one in extras.items()}
            )
            (one,) = backend.grad_output(dy, [spec], with_gain).adapters
            (other,) = backend.grad_output(
                dy, [dense], None if with_gain is None else gain.contiguous()
            ).adapters
            for a, b in zip(one, other, strict=True):
                assert a is None if b is None else torch.equal(a, b)
            assert not one.v.isnan().any()
            within_twice(
                [one.v],
                [expected(dy, spec, with_gain, dtype)[0]],
                [expected(dy, spec, with_gain, torch.float64)[0]],
                dtype,
            )


def test_few_ranks_take_one_pass(monkeypatch):
    """For few ranks the pass over dy computes u, too; for many, u is a projection of dy."""
    from lorafast.engine.kernels import grad_output as kernel

    seen = []
    monkeypatch.setattr(
        kernel,
        "project",
        lambda *args, real=kernel.project: seen.append("projected") or real(*args),
    )
    few, many = 16, 100
    assert configs.one_pass(few, few)
    assert not configs.one_pass(many, many)
    for R in (few, many):
        spec = UpProjGradSpec(torch.randn(20, R), h=torch.randn(9, R), want_B=True)
        backend.grad_output(torch.randn(9, 20), [spec])
    assert seen.count("projected") == 1

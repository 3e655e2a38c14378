"""grad_output in Triton's interpreter against float64 under the error rule: in one pass and in two, every sum and every mix."""

import pytest
import torch
from helpers.triton_interpreter import DTYPES, far_apart, strided, within_twice

from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels import configs
from lorafast.engine.problem import UpProjGradSpec
from lorafast.engine.reference import mix

# M, N, R, and how dy lies. Many ranks take two passes.
SHAPES = [
    (1, 72, 1, "contiguous"), (63, 130, 8, "transposed"), (17, 33, 12, "sliced"), (20, 40, 16, "transposed"),
    (70, 300, 24, "contiguous"), (65, 9, 64, "sliced"), (33, 70, 100, "transposed"),
]  # fmt: skip


def wanted(dy, back, gain, cast):
    """v, dB, d_core and d_out_scale of one adapter by stock torch in a dtype."""
    s, B, h, dy = float(back.scaling), back.B.to(cast), back.h.to(cast), dy.to(cast)
    core = None if back.core is None else back.core.to(cast)
    if gain is not None:
        dy = dy * gain.to(cast)
    scaled = B if back.out_scale is None else back.out_scale.to(cast)[:, None] * B
    u = s * (dy @ scaled)
    P = s * (dy.t() @ mix(h, core))
    dB = P.clone() if back.out_scale is None else P * back.out_scale.to(cast)[:, None]
    dB[:, : back.frozen_columns] = 0
    v = u if core is None else u * core if core.dim() == 1 else u @ core
    d_core = None if core is None else (u * h).sum(0) if core.dim() == 1 else u.t() @ h
    return v, dB, d_core, (P * B).sum(1)


@pytest.mark.parametrize(
    ("core", "extras"),
    [
        (None, "plain"),
        (None, "gained"),
        ("diagonal", "scaled"),
        ("diagonal", "gained"),
        ("full", "tensor scaling"),
        ("full", "plain"),
    ],
)
@pytest.mark.parametrize(("M", "N", "R", "layout"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_asked_at_once(dtype, M, N, R, layout, core, extras):
    found, eager, truth = ([], [], [], []), ([], [], [], []), ([], [], [], [])
    for _ in range(32 if M * R < 16 else 2):
        dy, h = strided(M, N, dtype, layout), strided(M, R, dtype, layout)
        C = {None: None, "diagonal": torch.randn(R), "full": torch.randn(R, R) / R**0.5}[core]
        gain = torch.rand(N) + 0.5 if extras == "gained" else None
        out_scale = torch.randn(N) if extras == "scaled" else None
        back = UpProjGradSpec(
            torch.randn(N, R), torch.tensor(1.7) if extras == "tensor scaling" else 1.7, out_scale, C, h,
            frozen_columns=0 if extras == "scaled" else R // 3,
            want_v=True, want_B=True, want_core=C is not None, want_out_scale=out_scale is not None,
        )  # fmt: skip
        kept = strided(M, N, dtype, layout)
        sums = backend.grad_output(dy, [back], gain, kept, want_bias=True)
        (own,) = sums.adapters
        assert own.v.dtype == dtype
        for kept_list, values in (
            (found, own), (eager, wanted(dy, back, gain, dtype)), (truth, wanted(dy, back, gain, torch.float64)),
        ):  # fmt: skip
            for some, value in zip(kept_list, values, strict=True):
                some.append(value)
        torch.testing.assert_close(sums.d_bias, dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            sums.dot, (dy.double() * kept.double()).sum(0).float(), rtol=1e-5, atol=1e-5
        )
    for i, name in enumerate(("v", "dB", "d_core", "d_out_scale")):
        if found[i][0] is not None:
            assert name == "v" or found[i][0].dtype == torch.float32
            within_twice(found[i], eager[i], truth[i], dtype)
        else:
            assert (name == "d_core" and core is None) or (
                name == "d_out_scale" and extras != "scaled"
            )


@pytest.mark.parametrize("R", [8, 100])
@pytest.mark.parametrize("asked", ["want_v", "want_B", "want_core", "want_out_scale"])
@pytest.mark.parametrize("want_bias", [False, True])
def test_each_alone_is_what_it_is_among_all(asked, R, want_bias):
    dy, h, core = torch.randn(40, 70), torch.randn(40, R), torch.randn(R, R)
    back = UpProjGradSpec(
        torch.randn(70, R),
        2.0,
        torch.randn(70),
        core,
        h,
        want_B=True,
        want_core=True,
        want_out_scale=True,
    )
    whole = backend.grad_output(dy, [back], want_bias=True)
    nothing = {"want_v": False, "want_B": False, "want_core": False, "want_out_scale": False}
    alone = backend.grad_output(
        dy, [back._replace(**(nothing | {asked: True}))], want_bias=want_bias
    )
    for name in ("v", "dB", "d_core", "d_out_scale"):
        one, other = getattr(alone.adapters[0], name), getattr(whole.adapters[0], name)
        assert (one is not None) == (
            asked == {"v": "want_v", "dB": "want_B"}.get(name, f"want_{name[2:]}")
        )
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert (alone.d_bias is not None) == want_bias
    assert alone.dot is None


@pytest.mark.parametrize("ranks", [(3, 8, 4), (60, 8), (200, 100)])
def test_several_adapters_are_each_as_alone(ranks):
    dy = torch.randn(40, 70)
    backs = [
        UpProjGradSpec(
            torch.randn(70, R), 0.5 + i, h=torch.randn(40, R), want_B=i != 1, want_v=i != 0
        )
        for i, R in enumerate(ranks)
    ]
    together = backend.grad_output(dy, backs, want_bias=True)
    torch.testing.assert_close(together.d_bias, dy.sum(0))
    for back, own in zip(backs, together.adapters, strict=True):
        (alone,) = backend.grad_output(dy, [back]).adapters
        for one, other in zip(own, alone, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_all_columns_frozen_and_sums_without_adapters():
    dy, h = torch.randn(9, 20), torch.randn(9, 4)
    (own,) = backend.grad_output(
        dy, [UpProjGradSpec(torch.randn(20, 4), h=h, frozen_columns=4, want_B=True)]
    ).adapters
    assert torch.equal(own.dB, torch.zeros(20, 4))
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
    back = UpProjGradSpec(torch.randn(20, 4), h=h, want_B=True)
    for one, other in zip(
        backend.grad_output(dy, [back]).adapters[0],
        backend.grad_output(torch.ones(15, 20), [back]).adapters[0],
        strict=True,
    ):
        assert one is None if other is None else torch.equal(one, other)


def test_rows_lie_beyond_two_to_the_thirty_first_element(tmp_path):
    rows, width = 20, 48
    far, near = far_apart(tmp_path, rows, width)
    back = UpProjGradSpec(torch.randn(width, 4), h=torch.randn(rows, 4).half(), want_B=True)
    one, other = (backend.grad_output(dy, [back], kept=dy) for dy in (far, near))
    assert torch.equal(one.adapters[0].v, other.adapters[0].v)
    assert torch.equal(one.adapters[0].dB, other.adapters[0].dB)
    assert torch.equal(one.dot, other.dot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_and_vectors_that_lie_apart(dtype):
    """A factor that needs neither a cast nor a scaling is read where it lies."""
    dy, h, B = (
        torch.randn(40, 70).to(dtype),
        torch.randn(40, 8).to(dtype),
        torch.randn(70, 16).to(dtype)[:, 3:11],
    )
    gain, out_scale = torch.rand(140)[::2], torch.rand(140)[::2]
    for extras in ({}, {"out_scale": out_scale}):
        for with_gain in (None, gain):
            back = UpProjGradSpec(B, h=h, want_B=True, want_out_scale=bool(extras), **extras)
            dense = back._replace(
                B=B.contiguous(), **{name: one.contiguous() for name, one in extras.items()}
            )
            (one,) = backend.grad_output(dy, [back], with_gain).adapters
            (other,) = backend.grad_output(
                dy, [dense], None if with_gain is None else gain.contiguous()
            ).adapters
            for a, b in zip(one, other, strict=True):
                assert a is None if b is None else torch.equal(a, b)
            assert not one.v.isnan().any()
            within_twice(
                [one.v],
                [wanted(dy, back, with_gain, dtype)[0]],
                [wanted(dy, back, with_gain, torch.float64)[0]],
                dtype,
            )


def test_what_needs_one_pass_takes_one(monkeypatch):
    """u comes out of the pass over columns where ranks are few, and is a projection of dy where they are many."""
    from lorafast.engine.kernels import grad_output as kernel

    seen = []
    monkeypatch.setattr(
        kernel,
        "project",
        lambda *args, real=kernel.project: seen.append("projected") or real(*args),
    )
    few, many = 16, 100
    assert configs.one_pass(few, few, torch.float32)
    assert not configs.one_pass(many, many, torch.float32)
    for R in (few, many):
        back = UpProjGradSpec(torch.randn(20, R), h=torch.randn(9, R), want_B=True)
        backend.grad_output(torch.randn(9, 20), [back])
    assert seen.count("projected") == 1

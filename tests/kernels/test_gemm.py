"""The GEMM of linear and grad_input in Triton's interpreter: every form and tile against float64 under the error rule."""

import pytest
import torch
import torch.nn.functional as F
from helpers.triton_interpreter import DTYPES, SEED, P, dropped, far_apart, strided, within_twice

from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels import configs, gemm_routing
from lorafast.engine.kernels.gemm import Summand, gemm
from lorafast.engine.kernels.gpu_specs import DEVICES
from lorafast.engine.problem import BaseTerm, LowRankTerm, UpProj

FORMS = [
    ("pointers", dtype, tile)
    for dtype in DTYPES
    for tile in configs.gemm("pointers", dtype, False, False)
]
FORMS += [("tma", torch.float16, tile) for tile in configs.gemm("tma", torch.float16, False, False)]
# M, N, K, R, and how the activations lie.
RAGGED = [
    (1, 72, 24, 1, "contiguous"), (63, 130, 70, 8, "sliced"), (17, 33, 301, 12, "transposed"), (33, 40, 48, 16, "sliced"),
    (70, 9, 130, 24, "contiguous"),
]  # fmt: skip
WIDE = [(130, 257, 65, 64, "sliced")]
# What a descriptor can hold: 16 bytes from row to row.
ALIGNED = [
    (1, 72, 24, 1, "contiguous"),
    (63, 136, 200, 12, "contiguous"),
    (130, 264, 72, 24, "contiguous"),
]
SHAPES = [
    (form, dtype, tile, shape)
    for form, dtype, tile in FORMS
    for shape in (ALIGNED if form == "tma" else RAGGED + WIDE * (tile.BLOCK_M >= 64))
]


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.fixture
def take(monkeypatch):
    """take(form, tile, splits): every product goes this way, as far as the form can."""

    def taken(form, tile=None, splits=1):
        def pick(asked):
            able = [route for route in gemm_routing.candidates(asked) if route.form == form]
            if tile is None:
                return able[0]
            # By its blocks: a masked product has fewer stages.
            route = next((route for route in able if route.tile[:3] == tile[:3]), able[-1])
            steps = gemm_routing._steps(asked, route.tile.BLOCK_K)
            share = (
                -(-steps // splits)
                if tile.BLOCK_M <= configs.SPLIT_ROWS and not asked.masked
                else steps
            )
            return route._replace(programs=3, splits=-(-steps // share), share=share)

        # The interpreter is no GPU: what its descriptors may hold is asked of one they are for.
        monkeypatch.setattr(gemm_routing, "device", lambda arch: DEVICES["sm_90"])
        monkeypatch.setattr(gemm_routing, "pick", pick)

    return taken


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "dtype", "tile", "shape"), SHAPES, ids=ids)
def test_linear(form, dtype, tile, shape, transposed, take):
    take(form, tile)
    check_linear(dtype, *shape, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("form", "dtype", "tile"),
    [one for one in FORMS if one[2].BLOCK_M <= configs.SPLIT_ROWS],
    ids=ids,
)
def test_linear_whose_sum_is_split(form, dtype, tile, transposed, take):
    take(form, tile, splits=3)
    check_linear(dtype, 17, 40, 301, 12, "sliced", transposed)


def check_linear(dtype, M, N, K, R, layout, transposed):
    """y and z, with a gain, a bias and a scaling, over two draws."""
    found, eager, truth = ([], []), ([], []), ([], [])
    for _ in range(2):
        x, B, mixed = strided(M, K, dtype, layout), torch.randn(N, R), strided(M, R, dtype, layout)
        W = strided(N, K, dtype, "transposed" if transposed else "contiguous")
        gain, bias = torch.rand(N) + 0.5, torch.randn(N)
        y, z = backend.linear(x, W, [UpProj(mixed, B, 1.7)], gain, bias, keep_inner=True)
        for kept, cast in ((found, None), (eager, dtype), (truth, torch.float64)):
            if cast is not None:
                z = F.linear(x.to(cast), W.to(cast)) + 1.7 * F.linear(mixed.to(cast), B.to(cast))
                y = gain.to(cast) * z + bias.to(cast)
            kept[0].append(y)
            kept[1].append(z)
    for i in range(2):
        assert found[i][0].dtype == dtype
        within_twice(found[i], eager[i], truth[i], dtype)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "dtype", "tile", "shape"), SHAPES, ids=ids)
def test_grad_input(form, dtype, tile, shape, transposed, p, take):
    take(form, tile)
    M, K, N, R, layout = shape
    found, eager, truth = [], [], []
    for _ in range(2):
        dy, v, A = strided(M, N, dtype, layout), strided(M, R, dtype, layout), torch.randn(R, K)
        W = strided(N, K, dtype, "transposed" if transposed else "contiguous")
        found.append(
            backend.grad_input([BaseTerm(dy, W)], [LowRankTerm(v, A, SEED if p else None, p)])
        )
        for kept, cast in ((eager, dtype), (truth, torch.float64)):
            kept.append(dy.to(cast) @ W.to(cast) + dropped(v.to(cast) @ A.to(cast), p).to(cast))
    within_twice(found, eager, truth, dtype)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first", "base first"])
def test_lists_of_adapters_and_of_segments(form, take):
    take(form)
    M, K, Ns, ranks = 70, 72, (24, 40, 48), (3, 8, 4)
    x = torch.randn(M, K).half()
    lows = [LowRankTerm(torch.randn(M, R).half(), torch.randn(R, K)) for R in ranks]
    masked = [lows[0]._replace(seed=SEED, p=P), lows[1]._replace(seed=SEED + 1, p=0.5)]
    segments = [
        BaseTerm(torch.randn(M, N).half(), torch.randn(N, K).half(), g)
        for N, g in zip(Ns, (None, torch.rand(40), None), strict=True)
    ]

    def reference(segments, lows, cast):
        total = torch.zeros(M, K, dtype=cast)
        for dy, W, gain in segments:
            total += (dy.to(cast) if gain is None else dy.to(cast) * gain.to(cast)) @ W.to(cast)
        for v, A, seed, p in lows:
            part = v.to(cast) @ A.to(cast)
            if p:
                part = (
                    part
                    * backend.eager.philox.kept(seed, p, slice(0, M), K)
                    * backend.eager.philox.scale(p)
                )
            total += part.to(cast)
        return total

    for some, chosen in (
        (segments, lows),
        (segments, masked[:1]),
        (segments[:2], [*masked[:1], lows[2]]),
        (segments[:1], masked),
    ):
        if form in ("pointers", "tma") and len([low for low in chosen if low.p]) > 1:
            continue  # two masks are torch's to add
        found = backend.grad_input(some, chosen)
        within_twice(
            [found],
            [reference(some, chosen, torch.float16)],
            [reference(some, chosen, torch.float64)],
            torch.float16,
        )
    ups = [
        UpProj(torch.randn(M, R).half(), torch.randn(24, R), s)
        for R, s in zip(ranks, (1.0, 2.0, torch.tensor(0.5)), strict=True)
    ]
    W = torch.randn(24, K).half()
    y, _ = backend.linear(x, W, ups)
    chains = [
        x.to(cast) @ W.to(cast).t()
        + sum(float(up.scaling) * (up.mixed.to(cast) @ up.B.to(cast).t()) for up in ups)
        for cast in (torch.float16, torch.float64)
    ]
    within_twice([y], chains[:1], chains[1:], torch.float16)


def test_two_masks_are_not_fused():
    lows = [
        LowRankTerm(torch.randn(5, 2), torch.randn(2, 16), SEED, P),
        LowRankTerm(torch.randn(5, 3), torch.randn(3, 16), SEED + 1, P),
    ]
    dy, W = torch.randn(5, 8), torch.randn(8, 16)
    found = backend.grad_input([BaseTerm(dy, W)], lows)
    torch.testing.assert_close(found, backend.eager.grad_input([BaseTerm(dy, W)], lows))


@pytest.mark.parametrize("form", ["pointers", "low first", "base first"])
@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_empty_sizes(M, N, K, form, take):
    take(form)
    x, W = torch.randn(M, K).half(), torch.randn(N, K).half()
    y, _ = backend.linear(x, W, [UpProj(torch.ones(M, 2).half(), torch.ones(N, 2))])
    assert torch.equal(y, torch.full((M, N), 2.0).half())
    if N:
        dx = backend.grad_input(
            [BaseTerm(torch.ones(M, N).half(), W)],
            [LowRankTerm(torch.zeros(M, 2).half(), torch.ones(2, K))],
        )
        torch.testing.assert_close(dx, torch.ones(M, N).half() @ W)


@pytest.mark.parametrize("form", ["pointers", "tma"])
def test_dy_that_is_one_number_expanded(form, take):
    take(form)
    W, v, A = torch.randn(40, 16).half(), torch.randn(9, 8).half(), torch.randn(8, 16)
    found = backend.grad_input(
        [BaseTerm(torch.ones(()).half().expand(9, 40), W)], [LowRankTerm(v, A)]
    )
    torch.testing.assert_close(
        found, backend.grad_input([BaseTerm(torch.ones(9, 40).half(), W)], [LowRankTerm(v, A)])
    )


@pytest.mark.parametrize(("form", "dtype", "tile"), FORMS, ids=ids)
def test_what_is_beyond_the_end_is_not_written(form, dtype, tile):
    M, N, K = 9, 24, 40
    a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    guarded, inner = (
        torch.full((M * N + 128,), 7.0, dtype=dtype),
        torch.full((M * N + 128,), 7.0, dtype=dtype),
    )
    out, z = (whole[64 : 64 + M * N].view(M, N) for whole in (guarded, inner))
    route = gemm_routing.Route(form, tile, 2, 1, 1 << 20)
    gemm(out, [Summand(a, b)], None, route, inner=z)
    torch.testing.assert_close(out, a @ b.t(), rtol=1e-2, atol=1e-2)
    assert torch.equal(out, z)
    for whole in (guarded, inner):
        assert (whole[:64] == 7).all()
        assert (whole[64 + M * N :] == 7).all()


def test_rows_lie_beyond_two_to_the_thirty_first_element(tmp_path, take):
    take("pointers")
    rows, width = 20, 48
    far, near = far_apart(tmp_path, rows, width)
    W = torch.randn(24, width).half()
    assert torch.equal(backend.linear(far, W, [])[0], backend.linear(near, W, [])[0])
    dy = torch.randn(6, rows).half()
    # As a weight, dense along its rows and read down its columns.
    assert torch.equal(
        backend.grad_input([BaseTerm(dy, far)], []), backend.grad_input([BaseTerm(dy, near)], [])
    )
    x = torch.randn(5, width).half()
    assert torch.equal(backend.linear(x, far, [])[0], backend.linear(x, near, [])[0])


@pytest.mark.parametrize("form", ["pointers", "tma", "low first", "base first"])
def test_a_dropped_nan_stays_dropped(form, take):
    take(form)
    v, A, dy, W = (
        torch.randn(9, 8).half(),
        torch.randn(8, 16),
        torch.randn(9, 24).half(),
        torch.randn(24, 16).half(),
    )
    v[3, 2], A[5, 7] = torch.nan, torch.inf
    found = backend.grad_input([BaseTerm(dy, W)], [LowRankTerm(v, A, SEED, P)])
    kept = backend.eager.philox.kept(SEED, P, slice(0, 9), 16)
    spoilt = torch.zeros(9, 16, dtype=torch.bool)
    spoilt[3], spoilt[:, 7] = True, True
    assert torch.equal(~found.isfinite(), spoilt & kept)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first", "base first"])
def test_vectors_and_factors_that_lie_apart(form, take):
    take(form)
    x, W, mixed = torch.randn(9, 16).half(), torch.randn(24, 16).half(), torch.randn(9, 8).half()
    gain, bias, out_scale, B = (
        torch.rand(48)[::2],
        torch.randn(1).expand(24),
        torch.rand(48)[::2],
        torch.randn(24, 16).half()[:, 1:9],
    )
    y, _ = backend.linear(x, W, [UpProj(mixed, B, 1.0, out_scale)], gain, bias)
    chains = [
        gain.to(c)
        * (x.to(c) @ W.to(c).t() + mixed.to(c) @ (out_scale.to(c)[:, None] * B.to(c)).t())
        + bias.to(c)
        for c in (torch.float16, torch.float64)
    ]
    within_twice([y], chains[:1], chains[1:], torch.float16)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first"])
def test_a_weight_of_another_dtype_is_cast_for_one_call(form, take):
    take(form)
    x, W, up = (
        torch.randn(9, 16).half(),
        torch.randn(24, 16),
        UpProj(torch.randn(9, 8).half(), torch.randn(24, 8)),
    )
    assert torch.equal(backend.linear(x, W, [up])[0], backend.linear(x, W.half(), [up])[0])

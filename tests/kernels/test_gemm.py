"""The GEMM of linear and grad_input in Triton's interpreter, against float64.

Every form and tile is tested by the error rule of helpers.triton_interpreter.within_twice.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.rotations import rotating, thinned
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
# M, N, K, R, and the layout of the activations.
RAGGED = [
    (1, 72, 24, 1, "contiguous"),
    (63, 130, 70, 8, "sliced"),
    (17, 33, 301, 12, "transposed"),
    (33, 40, 48, 16, "sliced"),
    (70, 9, 130, 24, "contiguous"),
]
WIDE = [(130, 257, 65, 64, "sliced")]
# Sizes that a descriptor can describe: the rows are a multiple of 16 bytes apart.
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
    """Return take(form, tile, splits): it sets the form, and if possible the tile, of products."""

    def taken(form, tile=None, splits=1):
        def pick(query):
            routes = [route for route in gemm_routing.candidates(query) if route.form == form]
            if tile is None:
                return routes[0]
            # Found by its blocks alone, because a masked product has fewer stages.
            route = next((route for route in routes if route.tile[:3] == tile[:3]), routes[-1])
            steps = gemm_routing._steps(query, route.tile.BLOCK_K)
            splittable = tile.BLOCK_M <= configs.SPLIT_ROWS and not query.masked
            share = -(-steps // splits) if splittable else steps
            return route._replace(programs=3, splits=-(-steps // share), steps_per_split=share)

        # The interpreter has no TMA: the candidates are those of a GPU that has it.
        monkeypatch.setattr(gemm_routing, "device", lambda arch: DEVICES["sm_90"])
        monkeypatch.setattr(gemm_routing, "pick", pick)

    return taken


@pytest.mark.parametrize(
    ("form", "dtype", "tile", "shape", "transposed"),
    thinned(((*case, turned) for case, turned in rotating(SHAPES, (False, True))), 3),
    ids=ids,
)
def test_linear(form, dtype, tile, shape, transposed, take):
    take(form, tile)
    check_linear(dtype, *shape, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("form", "dtype", "tile"),
    [form for form in FORMS if form[2].BLOCK_M <= configs.SPLIT_ROWS],
    ids=ids,
)
def test_linear_with_a_split_sum(form, dtype, tile, transposed, take):
    take(form, tile, splits=3)
    check_linear(dtype, 17, 40, 301, 12, "sliced", transposed)


def check_linear(dtype, M, N, K, R, layout, transposed):
    """Assert the error rule for y and z, with a gain, a bias and a scaling, over two draws."""
    ours, eager, truth = ([], []), ([], []), ([], [])
    for _ in range(2):
        x, B, h_core = strided(M, K, dtype, layout), torch.randn(N, R), strided(M, R, dtype, layout)
        W = strided(N, K, dtype, "transposed" if transposed else "contiguous")
        gain, bias = torch.rand(N) + 0.5, torch.randn(N)
        y, z = backend.linear(x, W, [UpProj(h_core, B, 1.7)], gain, bias, keep_inner=True)
        for values, cast in ((ours, None), (eager, dtype), (truth, torch.float64)):
            if cast is not None:
                z = F.linear(x.to(cast), W.to(cast)) + 1.7 * F.linear(h_core.to(cast), B.to(cast))
                y = gain.to(cast) * z + bias.to(cast)
            values[0].append(y)
            values[1].append(z)
    for i in range(2):
        assert ours[i][0].dtype == dtype
        within_twice(ours[i], eager[i], truth[i], dtype)


# Neighbours differ in one of the two, opposites in both.
TRANSPOSED_AND_DROPOUT = [(False, 0.0), (False, P), (True, P), (True, 0.0)]


@pytest.mark.parametrize(
    ("form", "dtype", "tile", "shape", "transposed", "p"),
    thinned(((*case, *turn) for case, turn in rotating(SHAPES, TRANSPOSED_AND_DROPOUT, 2, 2)), 3),
    ids=ids,
)
def test_grad_input(form, dtype, tile, shape, transposed, p, take):
    take(form, tile)
    M, K, N, R, layout = shape
    ours, eager, truth = [], [], []
    for _ in range(2):
        dy, v, A = strided(M, N, dtype, layout), strided(M, R, dtype, layout), torch.randn(R, K)
        W = strided(N, K, dtype, "transposed" if transposed else "contiguous")
        ours.append(
            backend.grad_input([BaseTerm(dy, W)], [LowRankTerm(v, A, SEED if p else None, p)])
        )
        for values, cast in ((eager, dtype), (truth, torch.float64)):
            values.append(dy.to(cast) @ W.to(cast) + dropped(v.to(cast) @ A.to(cast), p).to(cast))
    within_twice(ours, eager, truth, dtype)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first", "base first"])
def test_several_adapters_and_base_terms(form, take):
    take(form)
    M, K, Ns, ranks = 70, 72, (24, 40, 48), (3, 8, 4)
    x = torch.randn(M, K).half()
    terms = [LowRankTerm(torch.randn(M, R).half(), torch.randn(R, K)) for R in ranks]
    masked = [terms[0]._replace(seed=SEED, p=P), terms[1]._replace(seed=SEED + 1, p=0.5)]
    bases = [
        BaseTerm(torch.randn(M, N).half(), torch.randn(N, K).half(), g)
        for N, g in zip(Ns, (None, torch.rand(40), None), strict=True)
    ]

    def reference(bases, terms, cast):
        total = torch.zeros(M, K, dtype=cast)
        for dy, W, gain in bases:
            total += (dy.to(cast) if gain is None else dy.to(cast) * gain.to(cast)) @ W.to(cast)
        for v, A, seed, p, _ in terms:
            part = v.to(cast) @ A.to(cast)
            if p:
                part = (
                    part
                    * backend.eager.philox.keep_mask(seed, p, slice(0, M), K)
                    * backend.eager.philox.scale(p)
                )
            total += part.to(cast)
        return total

    for some_bases, some_terms in (
        (bases, terms),
        (bases, masked[:1]),
        (bases[:2], [*masked[:1], terms[2]]),
        (bases[:1], masked),
    ):
        if form in ("pointers", "tma") and len([term for term in some_terms if term.p]) > 1:
            continue  # torch adds two masked summands
        ours = backend.grad_input(some_bases, some_terms)
        within_twice(
            [ours],
            [reference(some_bases, some_terms, torch.float16)],
            [reference(some_bases, some_terms, torch.float64)],
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
        + sum(float(up.scaling) * (up.h_core.to(cast) @ up.B.to(cast).t()) for up in ups)
        for cast in (torch.float16, torch.float64)
    ]
    within_twice([y], chains[:1], chains[1:], torch.float16)


def test_two_masks_are_not_fused():
    terms = [
        LowRankTerm(torch.randn(5, 2), torch.randn(2, 16), SEED, P),
        LowRankTerm(torch.randn(5, 3), torch.randn(3, 16), SEED + 1, P),
    ]
    dy, W = torch.randn(5, 8), torch.randn(8, 16)
    ours = backend.grad_input([BaseTerm(dy, W)], terms)
    torch.testing.assert_close(ours, backend.eager.grad_input([BaseTerm(dy, W)], terms))


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
def test_an_expanded_dy(form, take):
    take(form)
    W, v, A = torch.randn(40, 16).half(), torch.randn(9, 8).half(), torch.randn(8, 16)
    ours = backend.grad_input(
        [BaseTerm(torch.ones(()).half().expand(9, 40), W)], [LowRankTerm(v, A)]
    )
    torch.testing.assert_close(
        ours, backend.grad_input([BaseTerm(torch.ones(9, 40).half(), W)], [LowRankTerm(v, A)])
    )


@pytest.mark.parametrize(("form", "dtype", "tile"), FORMS, ids=ids)
def test_nothing_is_written_outside_the_result(form, dtype, tile):
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


def test_rows_beyond_element_two_to_the_31(tmp_path, take):
    take("pointers")
    rows, width = 20, 48
    far, near = far_apart(tmp_path, rows, width)
    W = torch.randn(24, width).half()
    assert torch.equal(backend.linear(far, W, [])[0], backend.linear(near, W, [])[0])
    dy = torch.randn(6, rows).half()
    # The same tensor as a weight, dense along its rows and summed down its columns.
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
    ours = backend.grad_input([BaseTerm(dy, W)], [LowRankTerm(v, A, SEED, P)])
    kept = backend.eager.philox.keep_mask(SEED, P, slice(0, 9), 16)
    non_finite = torch.zeros(9, 16, dtype=torch.bool)
    non_finite[3], non_finite[:, 7] = True, True
    assert torch.equal(~ours.isfinite(), non_finite & kept)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first", "base first"])
def test_strided_vectors_and_factors(form, take):
    take(form)
    x, W, h_core = torch.randn(9, 16).half(), torch.randn(24, 16).half(), torch.randn(9, 8).half()
    gain, bias, out_scale, B = (
        torch.rand(48)[::2],
        torch.randn(1).expand(24),
        torch.rand(48)[::2],
        torch.randn(24, 16).half()[:, 1:9],
    )
    y, _ = backend.linear(x, W, [UpProj(h_core, B, 1.0, out_scale)], gain, bias)
    chains = [
        gain.to(c)
        * (x.to(c) @ W.to(c).t() + h_core.to(c) @ (out_scale.to(c)[:, None] * B.to(c)).t())
        + bias.to(c)
        for c in (torch.float16, torch.float64)
    ]
    within_twice([y], chains[:1], chains[1:], torch.float16)


@pytest.mark.parametrize("form", ["pointers", "tma", "low first"])
def test_a_weight_of_another_dtype_is_cast(form, take):
    take(form)
    x, W, up = (
        torch.randn(9, 16).half(),
        torch.randn(24, 16),
        UpProj(torch.randn(9, 8).half(), torch.randn(24, 8)),
    )
    assert torch.equal(backend.linear(x, W, [up])[0], backend.linear(x, W.half(), [up])[0])

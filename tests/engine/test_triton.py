"""The Triton backend in Triton's interpreter: errors against float64, and refusals."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import backends
from helpers.rotations import rotating, thinned
from helpers.triton_interpreter import (
    DTYPES,
    SEED,
    P,
    draws,
    dropped,
    strided,
    within_twice,
)

import lorafast
from lorafast.engine import dispatch
from lorafast.engine.backends import triton as backend
from lorafast.engine.kernels import configs, gemm_routing
from lorafast.engine.problem import DownProj, LowRankTerm
from lorafast.runtime import env
from lorafast.runtime.devices import Arch

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def forced(monkeypatch):
    """LORAFAST_BACKEND=triton, and no choice made before is remembered."""
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    dispatch._routes.cache_clear()
    yield
    dispatch._routes.cache_clear()


CPU, SM_90 = Arch("cpu", "cpu"), Arch("nvidia", "sm_90")
problem = functools.partial(backends.problem, arch=SM_90)

SHAPES = [
    (1, 40, 1, "sliced"),
    (63, 130, 8, "transposed"),
    (70, 1001, 12, "contiguous"),
    (5, 2050, 16, "sliced"),
    (33, 70, 24, "contiguous"),
    (17, 64, 64, "transposed"),
    (20, 48, 100, "contiguous"),
]
CORES_AND_DROPOUT = [
    (None, 0.0),
    ("diagonal", P),
    ("full", 0.0),
    (None, P),
    ("diagonal", 0.0),
    ("full", P),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "core", "p"),
    thinned(
        (shape, dtype, core, p)
        for (dtype, shape), (core, p) in rotating(
            itertools.product(DTYPES, SHAPES), CORES_AND_DROPOUT, 2
        )
    ),
)
def test_project(shape, dtype, core, p):
    M, K, R, layout = shape
    found, eager, truth = ([], []), ([], []), ([], [])
    for _ in draws(M * R):
        x, A = strided(M, K, dtype, layout), strided(R, K, torch.float32, layout) / K**0.5
        C = {None: None, "diagonal": torch.randn(R), "full": torch.randn(R, R) / R**0.5}[core]
        (pair,) = backend.project(x, [DownProj(A, C, SEED if p else None, p)])
        for kept, cast in ((found, None), (eager, dtype), (truth, torch.float64)):
            if cast is None:
                h, mixed = pair
                assert h.dtype == mixed.dtype == dtype
            else:
                h = F.linear(dropped(x.to(cast), p), A.to(cast))
                mixed = (
                    h if C is None else h * C.to(cast) if C.dim() == 1 else F.linear(h, C.to(cast))
                )
            kept[0].append(h)
            kept[1].append(mixed)
    for i in range(2):
        within_twice(found[i], eager[i], truth[i], dtype)


GRAD_PROJECT_SHAPES = [
    (1, 40, 1, "sliced"),
    (63, 130, 8, "transposed"),
    (700, 101, 12, "contiguous"),
    (33, 70, 24, "sliced"),
    (65, 64, 64, "contiguous"),
    (20, 48, 100, "contiguous"),
    (33, 70, 24, "transposed"),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "p"),
    [
        (shape, dtype, p)
        for (dtype, shape), p in rotating(itertools.product(DTYPES, GRAD_PROJECT_SHAPES), (0.0, P))
    ],
)
def test_grad_project(shape, dtype, p):
    M, K, R, layout = shape
    found, eager, truth = [], [], []
    for _ in draws(R * K):
        x, v = strided(M, K, dtype, layout), strided(M, R, dtype, layout)
        (dA,) = backend.grad_project(x, [LowRankTerm(v, torch.empty(R, K), SEED if p else None, p)])
        assert dA.dtype == torch.float32
        found.append(dA)
        eager.append(v.t() @ dropped(x, p).to(dtype))
        truth.append(v.double().t() @ dropped(x.double(), p))
    within_twice(found, eager, truth, dtype)


ROW_NORM_SHAPES = [
    (1, 40, 1, "sliced"),
    (65, 130, 8, "transposed"),
    (70, 33, 12, "contiguous"),
    (33, 70, 24, "sliced"),
    (17, 64, 64, "contiguous"),
    (40, 1, 3, "transposed"),
    (20, 48, 100, "contiguous"),
]
# Every axis and every kind of scaling for each shape, in turns.
NORMS = [(("out", 1.7), ("in", torch.tensor(1.7))), (("out", torch.tensor(1.7)), ("in", 1.7))]


@pytest.mark.parametrize(
    ("shape", "dtype", "axis", "scaling"),
    thinned(
        (
            (shape, dtype, *norm)
            for (dtype, shape), norms in rotating(itertools.product(DTYPES, ROW_NORM_SHAPES), NORMS)
            for norm in norms
        ),
        3,
    ),
    ids=lambda value: "tensor" if isinstance(value, torch.Tensor) else None,
)
def test_row_norm(shape, dtype, axis, scaling):
    N, K, R, layout = shape
    found, eager, truth = [], [], []
    for _ in draws(N if axis == "out" else K):
        W, A, B = (
            strided(N, K, dtype, layout),
            strided(R, K, torch.float32, layout),
            strided(N, R, torch.float32, layout),
        )
        found.append(backend.row_norm(W, A, B, scaling, axis))
        assert found[-1].dtype == torch.float32
        for kept, cast in ((eager, dtype), (truth, torch.float64)):
            kept.append(
                (W.to(cast) + float(scaling) * (B.to(cast) @ A.to(cast))).norm(
                    dim=1 if axis == "out" else 0
                )
            )
    within_twice(found, eager, truth, dtype)


def test_a_factor_is_cast_first_where_many_blocks_of_rows_read_it(monkeypatch):
    """The result is the same, bit for bit."""
    x, down = torch.randn(70, 130).half(), DownProj(torch.randn(40, 130))
    ours = []
    for casts in (False, True):
        monkeypatch.setattr(configs, "casts_first", lambda *args, casts=casts: casts)
        ours.append(backend.project(x, [down])[0][0])
    assert torch.equal(*ours)
    monkeypatch.undo()
    for R, M, casts in ((16, 8192, False), (64, 8192, True), (256, 64, False)):
        tile = configs.project(M, 4096, R, torch.float16, SM_90).tile
        assert configs.casts_first(tile, M, 4096, R, SM_90) == casts


def test_the_splits_are_those_of_few_rows():
    """What the shapes above run through: one program a tile, and several whose sums are added."""
    shares = [configs.project(M, K, 16, torch.float32, CPU) for M, K in ((63, 130), (5, 2050))]
    assert shares[0].splits == 1
    assert shares[1].splits > 1
    assert configs.grad_project(700, 101, 12, torch.float32, CPU).splits > 1
    assert configs.project(1 << 16, 4096, 16, torch.bfloat16, SM_90).splits == 1


@pytest.mark.parametrize("M", [1, 15, 64, 1000, 5000, 100000])
@pytest.mark.parametrize("K", [1, 40, 4096, 14336])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_a_share_covers_everything_once(M, K, dtype):
    for R in (1, 16, 17, 256):
        for pick, blocks_of, length in (
            (configs.project, "BLOCK_K", K),
            (configs.grad_project, "BLOCK_M", M),
        ):
            tile, splits, steps = pick(M, K, R, dtype, SM_90)
            block = getattr(tile, blocks_of)
            assert splits * steps * block >= length > (splits - 1) * steps * block
            assert tile in configs.tiles(pick.__name__, dtype)
            assert tile.BLOCK_R >= R


def test_what_is_beyond_the_end_is_not_written():
    """Guards around every output of a launch with ragged ends."""
    from lorafast.engine.kernels.project import project_kernel

    M, K, R = 9, 20, 3
    x, A = torch.randn(M, K), torch.randn(R, K)
    guarded = torch.full((M * R + 64,), 7.0)
    project_kernel[1, 1](
        x, A, x, guarded, M, K, R, K, 1, K, 1, 3, 0, 1.0, 1,
        DROPS=False, PARTS=False, PRECISION="ieee", BLOCK_M=16, BLOCK_K=64, BLOCK_R=16,
    )  # fmt: skip
    torch.testing.assert_close(guarded[: M * R].view(M, R), x @ A.t())
    assert (guarded[M * R :] == 7).all()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"arch": Arch("amd", "gfx1030")}, "AMD gfx90a, gfx942, gfx950, gfx11, gfx12 and Intel"),
        ({"arch": Arch("nvidia", "sm_75")}, "this is sm_75"),
        ({"dtype": torch.float64}, "x is torch.float64"),
        ({"weight_dtype": torch.float64}, "weight is torch.float64"),
        ({"factor_dtype": torch.float64}, "a factor is torch.float64"),
        ({"R": (8, 300)}, "R=300 exceeds 256"),
        ({"arch": Arch("cpu", "cpu")}, "Triton's interpreter computes bf16 wrongly"),
    ],
)
def test_every_refusal_has_its_reason(fields, why, forced, monkeypatch):
    # The primitive is not read: tests/contracts asks for each of them.
    if fields.get("arch") != Arch("cpu", "cpu"):
        monkeypatch.setattr(backend.triton.knobs.runtime, "interpret", False)
        assert backend.why_not("linear", problem()) == ()
    reasons = backend.why_not("linear", problem(**fields))
    assert len(reasons) == 1
    assert why in reasons[0]


def test_it_is_never_picked_unasked_on_a_cpu(monkeypatch):
    on_cpu = problem(arch=Arch("cpu", "cpu"), dtype=torch.float32, weight_dtype=torch.float32)
    assert backend.why_not("project", on_cpu) == (
        "runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)",
    )
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not env.interprets()
    assert backend.why_not("project", on_cpu) == (
        "runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)",
    )


def test_explain_and_the_log_say_which_way_a_product_goes(forced, monkeypatch, capsys):
    layer = lorafast.Linear(24, 32, adapter=lorafast.LoRA(r=4))
    way = str(
        gemm_routing.Route("pointers", configs.gemm("pointers", torch.float32, False, False)[0])
    )
    assert f"linear by triton: {way}" in lorafast.explain(layer).rows[0].notes
    monkeypatch.setenv("LORAFAST_LOG", "1")
    layer(torch.randn(gemm_routing.FEW_ROWS, 24))
    said = capsys.readouterr().err
    assert f"linear -> triton ({way})" in said
    assert "project -> triton;" in said
    on_h200 = problem(M=8192, K=14336, N=(4096,))
    assert backend.describe_route("linear", on_h200) == "torch's, low first"
    assert (
        backend.describe_route("grad_input", problem(M=8192, K=1024, N=(1024,), dropout=0.1))
        == "tma 128x256x64"
    )
    assert backend.describe_route("project", on_h200) is None


def test_forcing_it_on_what_it_cannot_raises_with_every_reason(forced):
    with pytest.raises(
        RuntimeError,
        match=r"LORAFAST_BACKEND=triton cannot project: .*bf16 wrongly; R=300 exceeds 256",
    ):
        lorafast.linear(
            torch.randn(2, 8).bfloat16(),
            torch.randn(4, 8).bfloat16(),
            None,
            torch.randn(300, 8),
            torch.randn(4, 300),
        )

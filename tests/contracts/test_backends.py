"""The contract of backends: the six primitives and drop, in every backend this machine can run."""

import inspect
from pathlib import Path

import pytest
import torch
from helpers import backends
from helpers.dropout_masks import SEEDS, assert_masks
from helpers.emulated_cuda import emulating
from helpers.integer_problems import (
    CHECKS,
    LAYOUTS,
    assert_rounded_once,
    assert_up_proj_grads,
    exact_drop,
    whole_numbers,
)
from helpers.nan_spread import assert_spreads
from helpers.primitive_problems import LAYOUTS as NORMAL_LAYOUTS
from helpers.primitive_problems import PROBLEMS, SUMS
from helpers.rotations import rotating, thinned
from helpers.triton_interpreter import SEED, draws, far_apart, within_twice
from torch import nn

import lorafast
from lorafast import testing
from lorafast.engine import dispatch, philox
from lorafast.engine.backends import Backend
from lorafast.engine.guarded_allocations import GuardedAllocations
from lorafast.engine.problem import (
    PRIMITIVES,
    BaseTerm,
    DownProj,
    LowRankTerm,
    UpProj,
    UpProjGradSpec,
)
from lorafast.runtime.devices import Arch
from lorafast.testing import FORMS

HALF = 0.5
# M, N, K, R: one token, ragged ends of every tile, a long sum over tokens.
SHAPES = [(1, 40, 72, 1), (70, 130, 257, 12), (300, 65, 1030, 33)]
EMPTY = [(0, 3, 4, 2), (3, 0, 4, 2), (3, 4, 0, 2), (0, 0, 0, 1)]


@pytest.fixture(autouse=True)
def device(request):
    """The emulated GPU, for the backend that runs on no other device."""
    asked = getattr(request.node, "callspec", None)
    named = asked and (asked.params.get("backend"), asked.params.get("name"))
    if named and (backends.module("cuda") in named or "cuda" in named):
        with emulating(90):
            yield
    else:
        yield


def test_every_backend_there_is_is_tested():
    folder = Path(inspect.getfile(Backend)).parent
    present = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert present == set(backends.DTYPES)
    assert present <= set(dispatch.ORDER)


@backends.each()
@pytest.mark.parametrize("name", [*PRIMITIVES, "why_not", "drop"])
def test_signatures_are_those_of_the_protocol(backend, name):
    asked = list(inspect.signature(getattr(Backend, name)).parameters.values())[1:]
    found = list(inspect.signature(getattr(backend, name)).parameters.values())
    assert [(one.name, one.default) for one in found[: len(asked)]] == [
        (one.name, one.default) for one in asked
    ]
    # Whatever more a backend takes is its own affair.
    assert all(one.default is not one.empty for one in found[len(asked) :])


# In the interpreter and on the emulator one: the tests of each kernel have more.
SHAPES_OF = {"eager": SHAPES, "cpu": SHAPES, "triton": SHAPES[1:2], "cuda": SHAPES[1:2]}


@backends.each_with_dtype_and_shape(SHAPES_OF)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_the_error_rule(backend, dtype, shape, primitive):
    layout = NORMAL_LAYOUTS[(SHAPES.index(shape) + PRIMITIVES.index(primitive)) % 3]
    results = []
    for _ in draws(shape[0] * shape[3]):
        found, formula = PROBLEMS[primitive](backend, dtype, *shape, layout)
        casts = (dtype, torch.float32, torch.float64)
        by_torch = (dict(zip(found, formula(cast), strict=True)) for cast in casts)
        results.append((found, *by_torch))
    for name in found:
        ours, chain, single, truth = (
            [one[name] for one in some] for some in zip(*results, strict=True)
        )
        if name in SUMS and backend in map(backends.module, backends.KERNELS):
            assert ours[0].dtype == torch.float32
            within_twice(ours, single, truth, torch.float32)
        else:
            within_twice(ours, chain, truth, dtype)


@backends.each_with_dtype()
@pytest.mark.parametrize("scaling", [1.7, torch.tensor(0.3)], ids=["number", "tensor"])
def test_a_factor_times_s_is_rounded_once(backend, dtype, scaling):
    B = torch.randn(40, 1)
    up = UpProj(torch.ones(1, 1, dtype=dtype), B, scaling)
    nothing = torch.zeros(1, 8, dtype=dtype), torch.zeros(40, 8, dtype=dtype)
    y, _ = backend.linear(*nothing, [up])
    assert torch.equal(y[0], (B[:, 0] * scaling).to(dtype))


# Not row_norm in eager and triton: it ends in torch's square root, which is not rounded correctly.
EXACT = [
    pytest.param(backend, primitive, marks=backends.MARKS.get(backend, ()))
    for backend in backends.DTYPES
    for primitive in PRIMITIVES
    if (backend, primitive) not in (("eager", "row_norm"), ("triton", "row_norm"))
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "primitive"), EXACT)
def test_whole_numbers_are_exact(name, primitive, layout):
    """Lists of adapters, cores, gains, frozen columns, tensor scalings; operands of any strides."""
    backend = backends.module(name)
    shape = [(5, 17, 33, 3), (20, 36, 70, 17)][LAYOUTS.index(layout) % 2]
    CHECKS[primitive](backend, torch.float32, torch.float32, *shape, layout)


@backends.each()
@pytest.mark.parametrize("shape", EMPTY, ids="M{0[0]}-N{0[1]}-K{0[2]}".format)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_no_tokens_no_inputs_no_outputs(backend, primitive, shape):
    CHECKS[primitive](backend, torch.float32, torch.float32, *shape, "sliced")


@backends.each_with_dtype()
def test_dropped_elements_are_those_of_philox(backend, dtype):
    for seed, p in zip(SEEDS, (0.05, 0.3, 0.5, 0.999), strict=True):
        assert_masks(backend, torch.tensor(seed), p, 9, 70, dtype)


@backends.each_with_dtype()
def test_what_is_infinite_and_dropped_stays_dropped(backend, dtype):
    kept = philox.keep_mask(SEED, HALF, slice(0, 70), 300)
    x = torch.where(kept, 1.0, float("inf")).to(dtype)
    v, A = torch.ones(70, 3, dtype=dtype), torch.ones(3, 300)
    assert backend.project(x, [DownProj(A, None, SEED, HALF)])[0][0].isfinite().all()
    assert backend.grad_project(x, [LowRankTerm(v, A, SEED, HALF)])[0].isfinite().all()
    assert torch.equal(backend.drop(x, SEED, HALF), (2 * kept).to(dtype))


@backends.each()
def test_a_nan_shows_where_it_is_used_and_nowhere_else(backend):
    assert_spreads(backend, torch.float32)


@backends.each(backends.KERNELS)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_nothing_is_written_beside_outputs_and_workspaces(backend, primitive):
    with GuardedAllocations() as guarded:
        CHECKS[primitive](backend, torch.float32, torch.float32, 27, 39, 101, 11, "sliced")
    assert guarded.whole


@backends.each(backends.KERNELS)
def test_rows_lie_beyond_two_to_the_thirty_first_element(backend, tmp_path):
    rows, width = 20, 48
    (far, near), v = far_apart(tmp_path, rows, width), torch.randn(rows, 4).half()
    A, B, W = torch.randn(4, width), torch.randn(rows, 4), torch.randn(9, width).half()
    spec = UpProjGradSpec(A.t(), h=v, want_B=True)

    def everything(x):
        sums = backend.grad_output(x, [spec], None, x, want_bias=True)
        return [
            *backend.project(x, [DownProj(A, None, SEED, HALF)])[0],
            *backend.grad_project(x, [LowRankTerm(v, A, SEED, HALF)]),
            backend.row_norm(x, A, B),
            backend.row_norm(x, A, B, axis="in"),
            *sums.adapters[0][:2],
            sums.d_bias,
            sums.dot,
            backend.grad_input([BaseTerm(x, W.t(), torch.ones(width))], [LowRankTerm(x, W.t())]),
            backend.linear(W, x, [UpProj(W, x)])[0],
        ]

    for one, other in zip(everything(far), everything(near), strict=True):
        assert torch.equal(one, other)


@backends.each()
@pytest.mark.parametrize("lies", ["dense", "permuted", "one number"])
def test_leading_dims_stay_and_outputs_are_fresh(backend, lies):
    def lying(width):
        x = whole_numbers(5 * width, 12, torch.float32, most=1).view(5, width, 12)
        if lies == "permuted":
            return x.permute(2, 0, 1)
        return x.reshape(12, 5, width) if lies == "dense" else x[0, 0, 0].expand(12, 5, width)

    x, dy = lying(33), lying(19)
    flat_x, flat_dy = x.reshape(60, 33).double(), dy.reshape(60, 19).double()
    shapes = (4, 33), (19, 4), (60, 4), (19, 33)
    A, B, h, W = (whole_numbers(*shape, torch.float32, "sliced", 3) for shape in shapes)
    spec, low = UpProjGradSpec(B, h=h, want_B=True), LowRankTerm(h, A, SEED, HALF)
    y, dx = backend.linear(x, W, [UpProj(h, B)])[0], backend.grad_input([BaseTerm(dy, W)], [low])
    assert (y.shape, dx.shape) == ((12, 5, 19), (12, 5, 33))
    biased = backend.linear(x, W, [], None, B[:, 0])[0]
    for fresh in (y, dx, biased, backend.drop(x, SEED, HALF)):
        assert fresh.is_contiguous()
        assert fresh._base is None
    assert_rounded_once(y.view(60, 19), flat_x @ W.double().t() + h.double() @ B.double().t())
    assert_rounded_once(
        dx.view(60, 33), flat_dy @ W.double() + 2 * exact_drop(h.double() @ A.double(), HALF)
    )
    assert_rounded_once(backend.drop(x, SEED, HALF).view(60, 33), 2 * exact_drop(flat_x, HALF))
    assert_rounded_once(backend.project(x, [DownProj(A)])[0][0], flat_x @ A.double().t())
    assert_rounded_once(
        backend.grad_project(x, [low])[0], 2 * h.double().t() @ exact_drop(flat_x, HALF)
    )
    sums = backend.grad_output(dy, [spec], None, dy, want_bias=True)
    assert_up_proj_grads(sums.adapters[0], flat_dy.float(), spec, None)
    assert_rounded_once(sums.dot, flat_dy.square().sum(0))


@backends.each()
def test_sums_are_the_same_from_run_to_run_and_operands_stay(backend):
    given = {name: torch.randn(301, width) for name, width in (("dy", 40), ("kept", 40), ("h", 5))}
    given |= {"B": torch.randn(40, 5), "core": torch.randn(5, 5), "gain": torch.rand(40)}
    before = {name: tensor.clone() for name, tensor in given.items()}

    def sums():
        spec = UpProjGradSpec(given["B"], 0.5, None, given["core"], given["h"], 2, True, True, True)
        found = backend.grad_output(given["dy"], [spec], given["gain"], given["kept"], True)
        return [*found.adapters[0][:3], found.d_bias, found.dot]

    assert all(torch.equal(one, other) for one, other in zip(sums(), sums(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())


@pytest.mark.parametrize("name", backends.DTYPES)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_what_is_unknown_is_refused_in_words(name, primitive, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    backend = backends.module(name)
    asked = (
        backends.problem(arch=Arch("martian", "m1")),
        backends.problem(dtype=torch.int8),
        backends.problem(weight_dtype=torch.float64, factor_dtype=torch.float64),
    )
    for problem in asked:
        reasons = backend.why_not(primitive, problem)
        assert isinstance(reasons, tuple)
        assert reasons == backend.why_not(primitive, problem)
        assert all(isinstance(reason, str) and reason for reason in reasons)
        # eager is what everything falls back on: it never refuses.
        assert bool(reasons) == (name != "eager")


SMALL = [form for form in FORMS if form.name in ("lora", "lamda", "vera", "dora-inner")]


@pytest.mark.parametrize(
    ("form", "p"),
    thinned((form, p) for form, ps in rotating(SMALL, ((0.0, 0.3), (0.3, 0.0))) for p in ps),
    ids=lambda value: getattr(value, "name", None),
)
@backends.each_name(tuple(backends.DTYPES))
def test_small_gradients_are_not_lost_in_fp16(name, form, p, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    case = testing.Case(form, 33, 70, 40, 6, torch.float16, p, grad_scale=2.0**-20)
    ratios = testing.error_ratios(case)
    assert max(ratios.values()) <= 2, ratios


ADAPTERS = [
    lorafast.LoRA(r=4, alpha=8, dropout=0.2),
    lorafast.DoRA(r=4, alpha=8, dropout=0.2),
    lorafast.LaMDA(r=4, alpha=8, dropout=0.2),
    lorafast.VeRA(r=8, dropout=0.2),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: type(adapter).__name__)
@backends.each_name(backends.KERNELS)
def test_a_model_trains_on_it_as_on_eager(name, adapter, monkeypatch):
    def losses(backend):
        monkeypatch.setenv("LORAFAST_BACKEND", backend)
        torch.manual_seed(0)
        first = lorafast.Linear(24, 32, adapter=adapter)
        model = nn.Sequential(first, nn.ReLU(), lorafast.Linear(32, 8, adapter=adapter))
        used = {one for row in lorafast.explain(model).rows for one in row.backends.values()}
        assert used == {backend}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        x, target, values = torch.randn(40, 24), torch.randn(40, 8), []
        for _ in range(4):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    found = losses(name)
    assert found == pytest.approx(losses("eager"), rel=1e-4)
    assert found[-1] < found[0]

"""The ops of experts: what they save, refuse and read, and what torch makes of them."""

import collections
import contextlib
import itertools

import pytest
import torch
import triton
from helpers import backends
from helpers.expert_cases import BY_NAME, COUNTS, K, N, R, problem

import lorafast
from lorafast import testing
from lorafast.engine import formula
from lorafast.engine.grouped import device, routes, torch_product
from lorafast.engine.grouped import triton as grouped_triton
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.kernels import launch
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.runtime import devices
from lorafast.runtime.devices import Arch
from lorafast.testing import Case, ExpertsCase

SAVED = (
    ("lora", (), lambda S, e: S * R * e, {"x"}),
    ("lora", ("lora_A",), lambda S, e: S * R * e, set()),
    ("lora", ("lora_A", "lora_B", "bias"), lambda S, e: 0, set()),
    ("lamda", ("lora_A",), lambda S, e: S * R * e, set()),
    ("vera", ("lora_A", "lora_B"), lambda S, e: S * R * e, set()),
    ("dora-inner", (), lambda S, e: S * R * e + S * N * e, {"x"}),
    ("dora-output", (), lambda S, e: S * R * e, {"x", "y"}),
    ("dora-recompute", (), lambda S, e: S * R * e, {"x"}),
)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "frozen", "own", "referenced"), SAVED)
def test_saved_bytes(form, frozen, own, referenced, dtype, p, monkeypatch):
    case = problem(form, dtype, p, bias=False)
    made = testing.make_experts(case)
    t = {name: testing.leaf(name, value) for name, value in made.items()}
    for name in frozen:
        if t[name] is not None:
            t[name].requires_grad_(False)
    offsets, rows = case.offsets, case.rows
    # The same tensors at every call, so that they count as given.
    monkeypatch.setattr(ExpertsCase, "offsets", offsets)
    monkeypatch.setattr(ExpertsCase, "rows", rows)
    constant = [v for name, v in t.items() if v is not None and name not in ("x", "dy", "seed")]
    saved = testing.saved(
        lambda: testing.ours_experts(case, t), {"x": t["x"]}, [*constant, offsets, rows]
    )
    extra = 8 * bool(p) + 4 * len(COUNTS) * N * case.case.form.magnitude
    assert saved.own == own(case.S, dtype.itemsize) + extra
    assert saved.referenced == referenced


def test_peak_memory_is_that_of_the_products():
    """Nothing of the weights' size is made: y, h, dx, u and gradients of the factors alone."""
    case = ExpertsCase(Case(BY_NAME["lora"], 0, 256, 512, 4, torch.float32, 0.1, False), (8,) * 32)
    t = {n: testing.leaf(n, v) for n, v in testing.make_experts(case, sliced=False).items()}

    def step():
        testing.ours_experts(case, t).backward(t["dy"])

    step()
    weight_bytes = t["weight"].numel() * 4
    factors = 4 * (t["lora_A"].numel() + t["lora_B"].numel())
    activations = 4 * case.S * (256 + 512)
    assert testing.allocated(step).peak < 3 * factors + 2 * activations < weight_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 3, K)}, r"x \(2, 3, 72\) must be \[S, K\]"),
        ({"offsets": torch.tensor([0, 5, 49], dtype=torch.int32)}, r"offsets \(3,\) .* \(6,\)"),
        ({"offsets": torch.zeros(6)}, r"offsets \(6,\) torch.float32"),
        ({"offsets": torch.tensor([0, 9, 5, 9, 9, 49], dtype=torch.int32)}, "offsets .* rise"),
        ({"offsets": torch.tensor([0, 5, 5, 9, 9, 50], dtype=torch.int32)}, "offsets .* 49 rows"),
        ({"rows": torch.arange(48)}, r"rows \(48,\) .* \(49,\)"),
        ({"weight": torch.zeros(N, K)}, r"weight \(40, 72\) must be \[E>0, N, K\]"),
        ({"lora_A": torch.zeros(4, R, K)}, r"lora_A \(4, 6, 72\) must be \[E, R, K\]"),
        ({"lora_B": torch.zeros(5, N, R + 1)}, r"lora_B \(40, 7\) must be"),
        ({"bias": torch.zeros(N)}, r"bias \(40,\) must be \[E, N\]"),
        ({"core": torch.zeros(R, R)}, r"core \(6, 6\) must be \[E, R, R\] or \[E, R\]"),
        ({"axis": "in"}, "axis='in'"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"scaling": float("nan")}, "scaling"),
        ({"keep": "all"}, "keep='all'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(changes, words):
    case = problem()
    t = testing.make_experts(case)
    given = {key: t[key] for key in ("x", "weight", "bias", "lora_A", "lora_B")}
    with pytest.raises((ValueError, TypeError), match=words):
        lorafast.grouped_linear(**({"offsets": case.offsets} | given | changes))


def test_a_backend_without_grouped_kernels_cannot_be_forced(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    case = problem()
    with pytest.raises(RuntimeError, match="cuda cannot serve experts: has no grouped kernels"):
        testing.ours_experts(case, testing.make_experts(case))


def test_auto_takes_the_triton_kernels_nowhere(monkeypatch):
    """None has a trial. Forced they serve, where a layer's kernels do."""
    problem = backends.problem(arch=Arch("nvidia", "sm_90"))
    monkeypatch.delenv("LORAFAST_BACKEND", raising=False)
    backend, refusals = routes.choice(problem)
    assert backend == "eager"
    assert "no trial covers its grouped kernels" in refusals["triton"][0]
    assert "LORAFAST_BACKEND=triton" in refusals["triton"][0]
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    routes._choice.cache_clear()
    assert routes.choice(problem) == ("triton", {})
    backend, refusals = routes.choice(backends.problem(arch=Arch("nvidia", "sm_90"), R=(300,)))
    assert backend == "none"
    assert "R=300 exceeds 256" in refusals["triton"][0]
    routes._choice.cache_clear()


@pytest.mark.compile
@pytest.mark.parametrize(("form", "p"), [("lora", 0.0), ("dora-inner", 0.3), ("vera", 0.3)])
def test_opcheck(form, p):
    case = problem(form, (p and torch.float32) or torch.float64, p, (5, 0, 9))
    t = {name: testing.leaf(name, v) for name, v in testing.make_experts(case).items()}
    norm = None
    if t["magnitude"] is not None:
        norm = torch.ones_like(t["magnitude"])
    tensors = (
        t["weight"].detach(), t["bias"], t["lora_A"], t["lora_B"], t["core"], t["magnitude"], norm,
        t["out_scale"], t["lora_bias"], t["seed"] if p else None, None,
    )  # fmt: skip
    keep = "inner" if form == "dora-inner" else "none"
    options = (1.7, p, "out", "adapter", keep, 0)
    torch.library.opcheck(
        torch.ops.lorafast.grouped_linear, (t["x"], case.offsets, case.rows, *tensors, *options)
    )
    torch.library.opcheck(
        torch.ops.lorafast.grouped_row_norm,
        (t["weight"].detach(), t["lora_A"].detach(), t["lora_B"].detach(), None, None, None, 1.7),
    )


@pytest.mark.compile
def test_a_compiled_call_is_not_compiled_again_for_another_routing():
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph.forward

    case = problem("dora", dropout=0.3)
    t = {name: testing.leaf(name, v) for name, v in testing.make_experts(case).items()}

    @torch.compile(backend=backend, fullgraph=True)
    def step(x, offsets, rows):
        return lorafast.grouped_linear(
            x, offsets, t["weight"], t["bias"], t["lora_A"], t["lora_B"],
            magnitude=t["magnitude"], scaling=1.7, dropout=0.3, seed=t["seed"], rows=rows,
        )  # fmt: skip

    for counts in (COUNTS, (0, 0, 49, 0, 0), (9, 10, 10, 10, 10)):
        routed = problem("dora", dropout=0.3, counts=counts)
        y = step(t["x"], routed.offsets, routed.rows)
        torch.testing.assert_close(y, testing.chain_experts(routed, t), rtol=1e-4, atol=1e-4)
    assert len(compiles) == 1


def test_where_torchs_grouped_product_refuses():
    """The reasons are there exactly where torch raises."""
    groups = Groups(torch.tensor([0, 5, 5, 12], dtype=torch.int32))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    shapes = itertools.product((1, 8, 21, 24), (1, 3, 8, 40), (0, 3, 8), (0, 1), (0, 1), (0, 1))
    for (wide, narrow, pad, shift, transposed, across), dtype in itertools.product(shapes, dtypes):
        weight = torch.randn(3, narrow, wide, dtype=dtype).transpose(1, 2)
        if transposed:
            weight = torch.randn(3, wide, narrow, dtype=dtype)
        x = torch.randn(12, wide + pad + shift, dtype=dtype)[:, shift : wide + shift]
        if across:
            x = torch.randn(wide, 12 + pad, dtype=dtype).t()[:12]
        why = torch_product.why_not(x, weight)
        if why:
            with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
                torch_product.product(groups, x, weight)
        else:
            expected = torch.cat((x[:5] @ weight[0], x[5:] @ weight[2]))
            found = torch_product.product(groups, x, weight)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("module", [device, grouped_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("form", ["lora", "dora-inner", "dora-recompute", "vera", "lamda", "dvora"])
def test_on_devices_the_host_reads_no_number(form, shared, module, monkeypatch):
    """Meta tensors have none: reading one raises."""
    monkeypatch.setattr(launch, "run", lambda *arguments, **flags: None)
    monkeypatch.setattr(devices, "of", lambda device: Arch("nvidia", "sm_90"))
    case = ExpertsCase(Case(BY_NAME[form], 0, N, K, 8, torch.bfloat16, 0.3), COUNTS, shared)
    made = testing.make_experts(case)
    made = {name: t if t is None else t.to("meta") for name, t in made.items()}
    tensors = LayerTensors(**{name: made[name] for name in LayerTensors._fields if name in made})
    keep = case.case.form.keep if tensors.magnitude is not None else "none"
    if tensors.magnitude is not None:
        tensors = tensors._replace(norm=torch.empty(len(COUNTS), N, device="meta"))
    options = CallOptions(1.7, 0.3, keep=keep)
    groups = Groups(case.offsets.to("meta"), case.rows.to("meta"))
    bound = collections.defaultdict(lambda: routes._OfGroups(module, groups))
    y, h, z = formula.forward(made["x"], tensors, options, bound)
    needs = GradMask(*(made.get(name) is not None for name in GradMask._fields))
    kept = z if keep == "inner" else y
    grads = formula.backward(made["dy"], made["x"], h, kept, tensors, options, needs, bound)
    for name, grad in zip(GradMask._fields, grads, strict=True):
        assert (grad is None) == (made.get(name) is None)
        assert grad is None or grad.shape == made[name].shape


@pytest.mark.parametrize("hooked", [False, True])
def test_an_output_that_backward_reads_and_that_was_modified(hooked):
    case = problem("dora-output", bias=False)
    t = {name: testing.leaf(name, v) for name, v in testing.make_experts(case).items()}
    hooks = contextlib.nullcontext()
    if hooked:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with hooks:
        y = testing.ours_experts(case, t)
    y = y.mul_(3.0)
    with pytest.raises(RuntimeError, match=r"keep='output' reads it again.*keep='inner'"):
        y.sum().backward()

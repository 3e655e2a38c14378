"""Layers of experts: errors, masks, gradients of zero, and what torch's product would pad."""

import itertools

import pytest
import torch
from helpers import backends
from helpers.expert_cases import BY_NAME, COUNTS, DTYPES, K, N, errors, norm_of, problem
from helpers.rotations import thinned

import lorafast
from lorafast import testing
from lorafast.engine.grouped import device, routes
from lorafast.testing import Case, ExpertsCase

CASES = [
    (name, form, dtype, p, bias, transposed)
    for i, (name, form, dtype) in enumerate(
        itertools.product(("eager", "cpu", "triton"), BY_NAME, DTYPES)
    )
    for p, bias, transposed in [((0.0, 0.3)[i % 2], i % 3 > 0, i % 5 == 0)]
    if dtype in backends.DTYPES[name]
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "dtype", "p", "bias", "transposed"), thinned(CASES, 3))
def test_errors(name, form, dtype, p, bias, transposed, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    case = problem(form, dtype, p, bias=bias, transposed=transposed)
    if not case.case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    found = errors(case)
    assert max(found.values()) <= 2, found


@pytest.mark.parametrize("form", BY_NAME)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float64_is_the_truth(form, p):
    case = problem(form, torch.float64, p)
    if not case.case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    t = testing.make_experts(case)
    expected = testing.run(testing.chain_experts, case, t)
    for part, value in testing.run(testing.ours_experts, case, t).items():
        torch.testing.assert_close(value, expected[part], rtol=1e-10, atol=1e-10)


@backends.each_name(("eager", "cpu", "triton"))
@pytest.mark.parametrize("counts", [(64, 0, 0), (0, 0, 1), (200, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("shared", ["A", "B"])
def test_errors_of_skewed_rows_and_shared_factors(name, counts, shared, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    for form, dtype, p in (
        ("vera", torch.bfloat16, 0.3), ("dora", torch.float32, 0.0), ("lamda", torch.float32, 0.3),
    ):  # fmt: skip
        dtype = dtype if dtype in backends.DTYPES[name] else torch.float16
        # Triton's interpreter takes its time.
        found = errors(problem(form, dtype, p, counts, shared), range(2 if name == "triton" else 4))
        assert max(found.values()) <= 2, (form, found)


@backends.each_name(("eager", "cpu", "triton"))
@pytest.mark.parametrize("form", ["lora", "dora", "vera", "adalora"])
def test_an_expert_without_rows_gets_gradients_of_zero(name, form, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    for counts in ((7, 0, 5), (0, 0)):
        case = problem(form, counts=counts)
        found = testing.run(testing.ours_experts, case, testing.make_experts(case))
        assert found["y"].shape == (sum(counts), N)
        for part, value in found.items():
            if part not in ("y", "x"):
                assert value.shape[0] == len(counts)
                for e, count in enumerate(counts):
                    assert bool(value[e].count_nonzero()) == bool(count), (part, e)


@backends.each_name(("eager", "cpu", "triton"))
def test_one_expert_is_a_layer(name, monkeypatch):
    """The bits of the mask, and with them the output, are lorafast.linear's."""
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    case = problem("lora", torch.float64 if name == "eager" else torch.float32, 0.4, (30,))
    t = testing.make_experts(case)
    one = {key: t[key][0] for key in ("weight", "bias", "lora_A", "lora_B")}
    options = {"scaling": 1.7, "dropout": 0.4, "seed": t["seed"]}
    expected = lorafast.linear(t["x"], **one, **options)
    many = {key: t[key] for key in ("weight", "bias", "lora_A", "lora_B")}
    found = lorafast.grouped_linear(t["x"], case.offsets, **many, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@backends.each_name(("eager", "cpu", "triton"))
def test_masks_depend_on_the_row_before_sorting_alone(name, monkeypatch):
    """Experts in another order, and their rows in another order, change no bit of a row."""
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    case = problem(dropout=0.5)
    t = testing.make_experts(case)
    bounds, order = case.offsets.tolist(), [4, 2, 0, 1, 3]
    rows = torch.cat([torch.arange(bounds[e], bounds[e + 1]).flip(0) for e in order])
    moved = ExpertsCase(case.case, tuple(COUNTS[e] for e in order))
    names = ("weight", "bias", "lora_A", "lora_B")
    options = {"scaling": 1.7, "dropout": 0.5, "seed": t["seed"]}
    y = lorafast.grouped_linear(
        t["x"], case.offsets, *(t[key] for key in names), rows=case.rows, **options
    )
    y_moved = lorafast.grouped_linear(
        t["x"][rows], moved.offsets, *(t[key][order] for key in names), rows=case.rows[rows],
        **options,
    )  # fmt: skip
    torch.testing.assert_close(y_moved, y[rows], rtol=1e-5, atol=1e-5)
    other = lorafast.grouped_linear(t["x"], case.offsets, *(t[key] for key in names), **options)
    assert not torch.allclose(other, y, rtol=1e-2, atol=1e-2)
    places = torch.arange(case.S)
    same = lorafast.grouped_linear(
        t["x"], case.offsets, *(t[key] for key in names), rows=places, **options
    )
    assert torch.equal(same, other)


@pytest.mark.parametrize("form", ["lora", "dora-recompute", "vera"])
def test_bits_do_not_depend_on_threads(form):
    case = problem(form, torch.bfloat16, 0.3, (300, 0, 2000, 90, 7))
    t, before = testing.make_experts(case), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(testing.run(testing.ours_experts, case, t))
    finally:
        torch.set_num_threads(before)
    for part, value in found[0].items():
        assert all(torch.equal(value, other[part]) for other in found[1:]), part


# form, frozen, bytes of its own by rows and element size, what is kept by reference
def test_gradients_equal_the_references_in_float64():
    case = problem("dvora", torch.float64, 0.3)
    t = testing.make_experts(case)

    def reference(case, t):
        one = case.case
        return lorafast.reference.grouped_linear(
            t["x"], case.offsets, t["weight"], t["bias"], t["lora_A"], t["lora_B"], t["core"],
            t["magnitude"], None, "out", t["out_scale"], t["lora_bias"], one.scaling, one.dropout,
            seed=t["seed"], rows=case.rows,
        )  # fmt: skip

    expected = testing.run(reference, case, t)
    for part, value in testing.run(testing.ours_experts, case, t).items():
        torch.testing.assert_close(value, expected[part], rtol=1e-10, atol=1e-10)


def test_a_trained_weight_and_scaling_run_on_plain_autograd():
    case = problem("dora", torch.float64)
    t = testing.make_experts(case)
    weight, s = (
        t["weight"].requires_grad_(),
        torch.tensor(1.7, dtype=torch.float64).requires_grad_(),
    )
    y = lorafast.grouped_linear(
        t["x"], case.offsets, weight, t["bias"], t["lora_A"], t["lora_B"],
        magnitude=t["magnitude"], scaling=s,
    )  # fmt: skip
    d_weight, d_s = torch.autograd.grad(y, (weight, s), t["dy"])
    expected = testing.chain_experts(case, t | {"weight": weight.detach()})
    torch.testing.assert_close(y, expected)
    assert d_weight.shape == weight.shape
    assert d_weight[1].count_nonzero() == 0
    # d_s is the sum of dy⊙(what s multiplies), beside a norm without a gradient.
    without = lorafast.grouped_linear(
        t["x"], case.offsets, weight.detach(), t["bias"], t["lora_A"], t["lora_B"] * 0,
        magnitude=t["magnitude"], norm=norm_of(case, t), scaling=1.7,
    )  # fmt: skip
    torch.testing.assert_close(d_s, ((y - without).detach() * t["dy"]).sum() / 1.7)


def test_autocast_casts_x_once():
    case = problem()
    t = {name: testing.leaf(name, v) for name, v in testing.make_experts(case).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = testing.ours_experts(case, t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert t["x"].grad.dtype == torch.float32


ON_DEVICES = [
    (form, dtype, (0.0, 0.3)[i % 2], i % 3 > 0, R)
    for i, (form, dtype, R) in enumerate(itertools.product(BY_NAME, DTYPES, (6, 8)))
]


@pytest.mark.parametrize(("form", "dtype", "p", "bias", "rank"), thinned(ON_DEVICES, 3))
def test_errors_of_what_serves_on_devices(form, dtype, p, bias, rank, monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    monkeypatch.setitem(routes._MODULES, "eager", device)
    case = ExpertsCase(Case(BY_NAME[form], 0, N, K, rank, dtype, p, bias), COUNTS)
    if not case.case.works:
        pytest.skip("keep='output' and a mask on the base term exclude each other")
    found = errors(case)
    assert max(found.values()) <= 2, found


@backends.each_name(("eager", "cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K_in", "N_out"), [(8, 6), (64, 100), (6, 8), (8, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("served_by", ["", "device"])
def test_rows_that_torch_would_pad(served_by, transposed, K_in, N_out, dtype, name, monkeypatch):
    """torch's grouped product makes rows that begin at multiples of 16 bytes."""
    monkeypatch.setenv("LORAFAST_BACKEND", name)
    if served_by:
        monkeypatch.setitem(routes._MODULES, name, device)
    for form in ("lora", "dora-inner"):
        one = Case(BY_NAME[form], 0, N_out, K_in, 4, dtype, 0.0, False, transposed=transposed)
        case = ExpertsCase(one, COUNTS)
        assert max(errors(case).values()) <= 2
        y = testing.ours_experts(case, testing.make_experts(case))
        assert y.is_contiguous()


def test_overlapping_rows():
    layer = lorafast.Experts(4, 32, 32, bias=False, adapter=lorafast.LoRA(r=4))
    offsets = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    x = torch.randn(12, 32, requires_grad=True)
    layer(x, offsets).sum(0).square().sum().backward()
    expected, x.grad = x.grad.clone(), None
    y = layer(x, offsets)
    y.backward(2 * y.sum(0).expand(12, 32).contiguous())
    torch.testing.assert_close(x.grad, expected)
    row = torch.randn(1, 32)
    dense = layer(row.repeat(12, 1), offsets)
    torch.testing.assert_close(layer(row.expand(12, 32), offsets), dense)

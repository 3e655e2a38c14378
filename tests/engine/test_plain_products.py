"""Calls of few tokens as plain products: right, with the op's dropout, where they serve alone."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast import testing
from lorafast.engine import formula, ops, plain_products
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.runtime import env
from lorafast.testing import FORMS, GRADIENTS, Case

pytestmark = pytest.mark.usefixtures("calls_by_python")
BY_NAME = {form.name: form for form in FORMS}
M, N, K, R = 5, 11, 13, 3
SERVED = ("lora", "lora-bias")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, None),
]
DTYPES_AND_P = [(*dtypes, p) for p in (0.0, 0.3) for dtypes in DTYPES]


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.delenv(env.BACKEND.name, raising=False)


@pytest.fixture
def taken(monkeypatch):
    """The routes of the calls, "plain" or "op", in order."""
    routes, plain, op = [], plain_products.products, formula.forward

    def record(name, function):
        return lambda *args: (routes.append(name), function(*args))[1]

    monkeypatch.setattr(plain_products, "products", record("plain", plain))
    monkeypatch.setattr(formula, "forward", record("op", op))
    return routes


def problem(form="lora", dtype=torch.float32, M=M, **settings):
    case = Case(BY_NAME[form], M, N, K, R, dtype, **settings)
    return case, testing.make(case)


@pytest.mark.parametrize("form", SERVED)
@pytest.mark.parametrize(("dtype", "factors", "p"), DTYPES_AND_P)
@pytest.mark.parametrize("bias", [True, False])
def test_the_error_rule(form, dtype, factors, p, bias, taken):
    case, _ = problem(form, dtype, dropout=p, bias=bias, adapter_dtype=factors)
    ratios = testing.error_ratios(case, seeds=range(20))
    assert taken
    assert set(taken) == {"plain"}
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("form", SERVED)
@pytest.mark.parametrize(("dtype", "factors", "p"), DTYPES_AND_P)
def test_without_gradients_the_bits_are_the_same(form, dtype, factors, p, taken):
    case, t = problem(form, dtype, dropout=p, adapter_dtype=factors)
    with torch.no_grad():
        y = testing.ours(case, t)
    assert torch.equal(y, testing.run(testing.ours, case, t)["y"])
    assert set(taken) == {"plain"}


@pytest.mark.parametrize("dtype", HALVES)
def test_biases_of_another_dtype(dtype, taken):
    case, t = problem("lora-bias", dtype)
    t |= {"bias": t["bias"].float(), "lora_bias": t["lora_bias"].double()}
    grads = testing.run(testing.ours, case, t)
    assert grads["bias"].dtype == torch.float32
    assert grads["lora_bias"].dtype == torch.float64
    assert set(taken) == {"plain"}


LAYOUTS = {
    "one dim": lambda: torch.randn(K, dtype=torch.float64),
    "three dims": lambda: torch.randn(2, 5, K, dtype=torch.float64),
    "transposed": lambda: torch.randn(5, 2, K, dtype=torch.float64).transpose(0, 1),
    "strided": lambda: torch.randn(4, 3, 2 * K, dtype=torch.float64)[::2, :, ::2],
    "expanded": lambda: torch.randn(1, 3, K, dtype=torch.float64).expand(4, 3, K),
    "no rows": lambda: torch.randn(3, 0, 2, K, dtype=torch.float64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_any_layout_of_x_gives_a_fresh_output_and_the_ops_numbers(layout, p, bias, taken):
    case, t = problem(dtype=torch.float64, dropout=p, bias=bias)
    x = LAYOUTS[layout]()
    t |= {"x": x, "dy": torch.randn(*x.shape[:-1], N, dtype=x.dtype)}
    plain = testing.run(testing.ours, case, t)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.BACKEND.name, "eager")
        op = testing.run(testing.ours, case, t)
    assert taken == ["plain", "op"]
    for name, value in op.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        assert not testing.ours(case, t)._is_view()
    assert not testing.ours(case, t | {"x": x.requires_grad_()})._is_view()


@pytest.mark.parametrize("needed", [("x",), ("lora_A",), ("lora_B",), ("bias", "x")], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_any_subset_of_gradients(needed, p, taken):
    case, t = problem(dtype=torch.float64, dropout=p)
    some = testing.run(testing.ours, case, t, trained=needed)
    every = testing.run(testing.ours, case, t, trained=GRADIENTS)
    for name in needed:
        torch.testing.assert_close(some[name], every[name])
    assert set(taken) == {"plain"}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_saved(dtype, p, taken):
    case, t = problem(dtype=dtype, dropout=p)
    t = {name: testing.leaf(name, tensor) for name, tensor in t.items()}
    constant = [t[name] for name in ("weight", "bias", "lora_A", "lora_B")]
    named = {"x": t["x"], "seed": t["seed"]}
    kept = testing.saved(lambda: testing.ours(case, t), named, constant)
    assert taken == ["plain"]
    dropped_x_and_mask = M * K * (dtype.itemsize + 1) if p else 0
    assert kept.own == M * R * dtype.itemsize + dropped_x_and_mask
    assert kept.referenced == (set() if p else {"x"})


def test_a_wider_factor_saves_a_copy_of_x_in_its_dtype(taken):
    case, t = problem(dtype=torch.bfloat16)
    t = {name: testing.leaf(name, tensor) for name, tensor in t.items()}
    constant = [t[name] for name in ("weight", "bias", "lora_A", "lora_B")]
    kept = testing.saved(lambda: testing.ours(case, t), {"x": t["x"]}, constant)
    assert taken == ["plain"]
    assert kept.own == M * (K + R) * torch.float32.itemsize


def test_an_adapter_at_its_start_changes_no_bit(taken):
    plain = nn.Linear(K, N)
    layer, x = lorafast.Linear.from_linear(plain, lorafast.LoRA(r=R)), torch.randn(M, K)
    assert torch.equal(layer(x), plain(x))
    assert taken == ["plain"]


@pytest.mark.parametrize("scaling", [1 / 16, 16.0])
@pytest.mark.parametrize("size", [2.0**-20, 2.0**11])
def test_gradients_beyond_fp16_are_not_lost(scaling, size, taken):
    """As large as a gradient scaler makes them, and as small as a mean does."""
    case, _ = problem("lora-bias", torch.float16, scaling=scaling)
    made = [testing.make(case, seed) for seed in range(20)]
    for tensors in made:
        tensors["dy"] = tensors["dy"] * size
    # The large gradient of x itself is beyond fp16.
    trained = ("bias", "lora_A", "lora_B", "lora_bias")
    yardstick = testing.Yardstick(case, made, trained=trained)
    ratios = yardstick.ratios(lambda t: testing.run(testing.ours, case, t, trained=trained))
    assert max(ratios.values()) <= 2, ratios
    assert set(taken) == {"plain"}


def test_fp16_throughout_stays_on_the_op(taken):
    case, t = problem(dtype=torch.float16, adapter_dtype=torch.float16)
    testing.ours(case, t)
    assert taken == ["op"]


def test_x_may_be_overwritten_where_A_is_frozen(taken):
    adapter = lorafast.LoRA(r=R, dropout=0.3, freeze_A=True)
    layer, x = lorafast.Linear(K, N, adapter=adapter), torch.randn(M, K)
    y = layer(x)
    x.zero_()
    y.sum().backward()
    assert layer.lora_B.grad is not None
    assert set(taken) == {"plain"}


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_and_batched_gradients(p, taken):
    case, t = problem(dtype=torch.float64, dropout=p)
    t = {name: testing.leaf(name, tensor) for name, tensor in t.items()}
    leaves = [t["x"], t["lora_A"], t["lora_B"]]
    found = []
    for function in (testing.ours, testing.chain):
        y = function(case, t)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        y = function(case, t)
        dys = torch.stack([t["dy"], 2 * t["dy"]])
        found.append([*second, *torch.autograd.grad(y, leaves, dys, is_grads_batched=True)])
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-10, atol=1e-10)
    assert set(taken) == {"plain"}


def tensors_of(case, t):
    names = ("weight", "bias", "lora_A", "lora_B", "core", "magnitude")
    tensors = LayerTensors(*(t[name] for name in names), None, t["out_scale"], t["lora_bias"])
    return tensors, CallOptions(case.scaling, case.dropout)


@pytest.mark.parametrize("name", [form.name for form in FORMS])
def test_which_forms_are_served(name):
    case, t = problem(name)
    tensors, options = tensors_of(case, t)
    served = plain_products.why_not(M, tensors, options, torch.float32) is None
    assert served == (name in SERVED)


def test_what_the_op_keeps_to_itself():
    case, t = problem()
    tensors, options = tensors_of(case, t)

    def why_not(M=M, tensors=tensors, options=options, dtype=torch.float32):
        return plain_products.why_not(M, tensors, options, dtype)

    assert why_not() is None
    assert "no LoRA" in why_not(options=options._replace(frozen_columns=1))
    assert "no LoRA" in why_not(tensors=tensors._replace(scale=torch.ones(1)))
    assert "another dtype" in why_not(dtype=torch.bfloat16)
    assert "CPUs only" in why_not(tensors=tensors._replace(weight=t["weight"].to("meta")))
    most = plain_products.MOST_ELEMENTS // (N + K)
    assert why_not(most) is None
    assert f"{most + 1} tokens" in why_not(most + 1)
    # A copy of x, for dropout or for wider factors, makes the products dearer.
    assert "tokens" in why_not(most, options=options._replace(dropout=0.1))
    half = tensors._replace(weight=t["weight"].bfloat16())
    assert "tokens" in why_not(most, tensors=half, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["eager", " EAGER "])
def test_a_forced_backend_is_not_left(backend, taken, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, backend)
    case, t = problem()
    testing.ours(case, t)
    assert taken == ["op"]


def test_many_tokens_and_autocast_get_the_op(taken):
    case, t = problem(M=plain_products.MOST_ELEMENTS // (N + K) + 1)
    testing.ours(case, t)
    case, t = problem()
    with torch.autocast("cpu"):
        testing.ours(case, t)
    assert taken == ["op", "op"]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_observers_see_products_but_no_kernel_of_ours(p, taken):
    """The mask is made by a kernel that reads memory, so that dropout is left to the op."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    case, t = problem(dropout=p)
    expected = testing.ours(case, t)
    with Seen():
        y = testing.ours(case, t)
    torch.testing.assert_close(y, expected)
    assert (torch.ops.lorafast.linear.default in seen) == (p > 0)
    assert (torch.ops.aten.add.Tensor in seen) == (p == 0)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_fake_and_meta_tensors(p):
    layer = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=R, dropout=p))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(M, K)).shape == (M, N)
    assert layer.to("meta")(torch.randn(M, K, device="meta")).is_meta


def test_a_sparse_weight_is_left_to_the_reference(taken):
    weight, A, B = torch.randn(N, K).to_sparse(), torch.randn(R, K), torch.randn(N, R)
    x = torch.randn(M, K)
    y = lorafast.linear(x, weight, None, A, B)
    torch.testing.assert_close(y, x @ (weight.to_dense() + B @ A).T)
    assert not taken


def test_transforms_of_torch_func_reach_the_products(taken):
    layer, x = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=R)), torch.randn(4, M, K)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, layer(x) - layer(torch.zeros_like(x)))
    assert set(taken) == {"plain"}


@pytest.mark.parametrize("dropped", ["x", "weight", "A", "B", "bias", "lora_bias", "scaling", "p"])
def test_what_is_wrong_is_left_to_the_checks(dropped, taken):
    """Each argument in turn of a wrong shape, dtype or value: the error is that of the checks."""
    wrong = {
        "x": torch.randn(M, K + 1), "weight": torch.randn(N, K, 1), "A": torch.randn(R, K - 1),
        "B": torch.randn(N, R + 1), "bias": torch.randn(1), "lora_bias": torch.randn(N + 1),
        "scaling": float("nan"), "p": "0.1",
    }  # fmt: skip
    given = {
        "x": torch.randn(M, K), "weight": torch.randn(N, K), "A": torch.randn(R, K),
        "B": torch.randn(N, R), "bias": None, "lora_bias": None, "scaling": 1.0, "p": 0.0,
    }  # fmt: skip
    given[dropped] = wrong[dropped]
    x, weight, A, B, bias, lora_bias, scaling, p = given.values()
    named = {"A": "lora_A", "B": "lora_B", "p": "dropout", "weight": "weight"}
    with pytest.raises((ValueError, TypeError), match=named.get(dropped, dropped)):
        lorafast.linear(x, weight, bias, A, B, lora_bias=lora_bias, scaling=scaling, dropout=p)
    assert not taken


def test_the_log_tells(monkeypatch, capsys):
    monkeypatch.setenv(env.LOG.name, "1")
    case, t = problem()
    for _ in range(3):
        testing.ours(case, t)
    told = capsys.readouterr().err
    assert told.count(f"linear -> plain products; M={M}, weight {(N, K)}") == 1


def test_explain_tells():
    layer = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=R))
    (row,) = lorafast.explain(layer, tokens=M).rows
    assert "5 tokens are few: plain torch products instead of the op" in row.notes
    assert row.saved is None
    (row,) = lorafast.explain(layer, tokens=plain_products.MOST_ELEMENTS).rows
    assert not any("few" in note for note in row.notes)
    assert row.saved == R * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout(reentrant, taken):
    layer = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=R, dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(M, K, requires_grad=True)

    def gradients(function):
        torch.manual_seed(3)
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
        function(x).sum().backward()
        return x.grad, layer.lora_A.grad, layer.lora_B.grad

    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, same in zip(gradients(layer), again, strict=True):
        assert torch.equal(one, same)
    assert set(taken) == {"plain"}


def test_no_op_of_ours_is_called(monkeypatch):
    monkeypatch.setattr(ops, "_apply_linear", None)
    layer = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=R))
    layer(torch.randn(M, K, requires_grad=True)).sum().backward()
    assert layer.lora_B.grad is not None

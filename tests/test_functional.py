"""lorafast.linear as a user calls it: shapes, strides, subsets of gradients, seeds, NaN."""

import itertools
from dataclasses import replace

import pytest
import torch

import lorafast
from lorafast import testing
from lorafast.engine import philox
from lorafast.engine.backends import eager
from lorafast.engine.problem import DownProj, LowRankTerm
from lorafast.testing import FORMS, GRADIENTS, Case

BY_NAME = {form.name: form for form in FORMS}
N, K, R = 11, 13, 3


def problem(form="lora", dtype=torch.float64, M=6, **settings):
    case = Case(BY_NAME[form], M, N, K, R, dtype, **settings)
    return case, testing.make(case)


def call(case, t, x, seed=None):
    return testing.ours(case, t | {"x": x} | ({} if seed is None else {"seed": seed}))


LAYOUTS = {
    "one dim": lambda: torch.randn(K, dtype=torch.float64),
    "three dims": lambda: torch.randn(2, 5, K, dtype=torch.float64),
    "transposed": lambda: torch.randn(5, 2, K, dtype=torch.float64).transpose(0, 1),
    "strided": lambda: torch.randn(4, 3, 2 * K, dtype=torch.float64)[::2, :, ::2],
    "expanded": lambda: torch.randn(1, 3, K, dtype=torch.float64).expand(4, 3, K),
    "columns first": lambda: torch.randn(K, 7, dtype=torch.float64).t(),
    "no rows": lambda: torch.randn(0, K, dtype=torch.float64),
    "no rows in the middle": lambda: torch.randn(3, 0, 2, K, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "form", ["lora", "vera", "dora-output", "dora-inner", "dora-both", "dora-in", "dora-recompute"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_any_layout_of_x(form, layout, p):
    case, t = problem(form, dropout=p)
    x = LAYOUTS[layout]()
    flat = x.reshape(-1, K) if x.numel() else x.new_empty(0, K)
    dy = torch.randn(*x.shape[:-1], N, dtype=x.dtype)
    got = testing.run(lambda case, t: testing.ours(case, t), case, t | {"x": x, "dy": dy})
    want = testing.run(testing.chain, case, t | {"x": flat, "dy": dy.reshape(-1, N)})
    assert got["y"].shape == dy.shape
    assert got["x"].shape == x.shape
    for name, value in want.items():
        torch.testing.assert_close(got[name].reshape(value.shape), value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_any_layout_of_dy(layout):
    case, t = problem("dora", dropout=0.3)
    dy = (
        torch.randn(1, N, dtype=torch.float64).expand(6, N)
        if layout == "expanded"
        else torch.randn(N, 6, dtype=torch.float64).t()
    )
    got, want = (testing.run(f, case, t | {"dy": dy}) for f in (testing.ours, testing.chain))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12)


def test_a_transposed_weight_is_used_as_it_lies():
    case, t = problem("dora")
    conv1d = t["weight"].t().contiguous().t()
    got, want = (
        testing.run(testing.ours, case, t | {"weight": conv1d}),
        testing.run(testing.ours, case, t),
    )
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["dvora", "lora-bias", "dora-in", "dora-both", "dora-recompute"])
def test_any_subset_of_inputs_may_require_grad(form):
    case, t = problem(form, dropout=0.3)
    names = [name for name in GRADIENTS if t[name] is not None]
    full = testing.run(testing.ours, case, t)
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in (1, 2, len(names) - 1)
    ):
        leaves = {
            name: None if v is None else v.detach().requires_grad_(name in chosen)
            for name, v in t.items()
            if name != "seed"
        }
        testing.ours(case, leaves | {"seed": t["seed"]}).backward(t["dy"])
        for name in names:
            if name in chosen:
                torch.testing.assert_close(leaves[name].grad, full[name], rtol=1e-12, atol=1e-12)
            else:
                assert leaves[name].grad is None


@pytest.mark.parametrize("form", ["lora", "lamda", "dora-output", "dora-inner", "dora-in"])
def test_outputs_are_fresh(form):
    case, t = problem(form)
    x = t["x"].requires_grad_()
    y = call(case, t, x)
    assert not y._is_view()
    assert y.is_contiguous()
    assert y.untyped_storage().nbytes() == y.numel() * y.itemsize
    y.sum().backward()
    assert x.grad.is_contiguous()


@pytest.mark.parametrize("op", ["relu_", "add_", "mul_"])
@pytest.mark.parametrize(
    "form",
    ["lora", "lamda", "adalora", "vera", "dora-inner", "dora-recompute", "dora-both", "dora-in"],
)
def test_in_place_ops_on_the_output(form, op):
    case, t = problem(form, dropout=0.3)
    follow = {
        "relu_": lambda y: y.relu_(),
        "add_": lambda y: y.add_(1),
        "mul_": lambda y: y.mul_(3),
    }[op]
    apart = {"relu_": torch.relu, "add_": lambda y: y + 1, "mul_": lambda y: y * 3}[op]
    got = testing.run(lambda case, t: follow(testing.ours(case, t)), case, t)
    want = testing.run(lambda case, t: apart(testing.ours(case, t)), case, t)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_in_place_after_keep_output_names_the_layer_and_the_mend():
    case, t = problem("dora-output", dtype=torch.float32, bias=False)
    t = {
        name: None if v is None or name == "seed" else v.detach().requires_grad_(name != "dy")
        for name, v in t.items()
    }
    t["weight"].requires_grad_(False)
    y = testing.ours(case, t).relu_()
    with pytest.raises(RuntimeError, match=rf"weight \({N}, {K}\).*keep='inner'"):
        y.sum().backward()
    t["magnitude"].lorafast_name = "model.layers.3.v_proj"
    y = testing.ours(case, t).relu_()
    with pytest.raises(RuntimeError, match=r"model\.layers\.3\.v_proj: .*keep='inner'"):
        y.sum().backward()


def test_in_place_on_something_else_is_not_blamed_on_the_output():
    case, t = problem("dora-output", dtype=torch.float32, bias=False)
    t = {
        name: None if v is None or name == "seed" else v.detach().requires_grad_(name in GRADIENTS)
        for name, v in t.items()
    }
    x = t["x"].detach().clone()
    y = testing.ours(case, t | {"x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("scaling", [0.02, 0.25])
def test_a_sum_beyond_half_precision_is_scaled_before_it_is_rounded(scaling):
    B = torch.ones(3, 1, requires_grad=True)
    x, dy = (
        torch.full((64, 1), 2.0, dtype=torch.float16),
        torch.full((64, 3), 32.0, dtype=torch.float16),
    )
    A, W = torch.full((1, 1), 20.0), torch.ones(3, 1, dtype=torch.float16)
    lorafast.linear(x, W, None, A, B, scaling=scaling).backward(dy)
    torch.testing.assert_close(
        B.grad, torch.full((3, 1), 64 * 2 * 20 * 32 * scaling), rtol=1e-3, atol=0
    )


def test_a_rare_survivor_does_not_overflow_in_half_precision():
    t = testing.make(Case(BY_NAME["lora"], 64, N, K, R, torch.float16))
    # scale·A would be 93,620, past fp16's 65,504; h is not.
    y = lorafast.linear(
        t["x"] / 50,
        t["weight"],
        None,
        torch.full((R, K), 10.0),
        t["lora_B"],
        dropout=0.9999,
        seed=t["seed"],
    )
    assert y.isfinite().all()


@pytest.mark.parametrize("form", ["lora", "dora-output", "dora-both", "vera"])
def test_retain_graph(form):
    case, t = problem(form, dropout=0.3)
    leaves = {
        name: None if v is None else v.detach().requires_grad_(name in GRADIENTS)
        for name, v in t.items()
        if name != "seed"
    }
    y = testing.ours(case, leaves | {"seed": t["seed"]})
    y.backward(t["dy"], retain_graph=True)
    once = {name: leaves[name].grad.clone() for name in GRADIENTS if leaves[name] is not None}
    y.backward(t["dy"])
    for name, value in once.items():
        torch.testing.assert_close(leaves[name].grad, 2 * value)


def test_frozen_columns_get_a_zero_gradient_and_no_work():
    case, t = problem("lamda")
    full = testing.run(testing.ours, case, t)["lora_B"]
    leaf = t["lora_B"].clone().requires_grad_()
    y = lorafast.linear(
        t["x"],
        t["weight"],
        None,
        t["lora_A"],
        leaf,
        core=t["core"],
        scaling=case.scaling,
        frozen_columns=2,
    )
    y.backward(t["dy"])
    assert torch.equal(leaf.grad[:, :2], torch.zeros(N, 2, dtype=torch.float64))
    torch.testing.assert_close(leaf.grad[:, 2:], full[:, 2:])


def test_frozen_columns_shrink_the_gemm_of_dB(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    from lorafast.engine import ops
    from lorafast.engine.problem import CallOptions, GradMask, LayerTensors

    # A counter of torch's products sees nothing of what a kernel of ours computes.
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    t = testing.make(Case(BY_NAME["lamda"], 32, 16, 24, 8, torch.float32, bias=False))
    flops = []
    for frozen in (0, 4, 8):
        tensors, wants = (
            LayerTensors(t["weight"], lora_A=t["lora_A"], lora_B=t["lora_B"], core=t["core"]),
            GradMask(lora_B=True),
        )
        with FlopCounterMode(display=False) as counter:
            settings = CallOptions(frozen_columns=frozen)
            # Through the dispatcher the op is one node, and its inside out of the counter's sight.
            ops._linear_backward(
                t["dy"], None, torch.randn(32, 8), None, *tensors, *settings, list(wants)
            )
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == flops[1] - flops[2] == 2 * 32 * 16 * 4


def test_dropout_follows_torchs_generator():
    case, t = problem("lora", dropout=0.5)
    torch.manual_seed(3)
    a = call(case, t | {"seed": None}, t["x"])
    b = call(case, t | {"seed": None}, t["x"])
    torch.manual_seed(3)
    again = call(case, t | {"seed": None}, t["x"])
    assert torch.equal(a, again)
    assert not torch.equal(a, b)


def test_no_dropout_and_no_draw_outside_training():
    case, t = problem("lora", dropout=0.5)
    state = torch.get_rng_state()
    given = {name: t[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")}
    got = lorafast.linear(**given, scaling=case.scaling, dropout=0.5, training=False)
    torch.testing.assert_close(got, testing.chain(replace(case, dropout=0.0), t))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_dropped_nan_stays_dropped_and_a_kept_one_passes(poison):
    x, A, v, seed = torch.randn(64, K), torch.randn(R, K), torch.randn(64, R), torch.tensor([5])
    kept = philox.keep_mask(seed, 0.5, slice(0, 64), K)
    low = LowRankTerm(v, A, seed, 0.5)

    def everything(x):
        ((h, _),) = eager.project(x, [DownProj(A, None, seed, 0.5)])
        return (
            h,
            philox.differentiable_drop(x, seed, 0.5),
            philox.drop(x, seed, 0.5),
            eager.grad_project(x, [low])[0],
        )

    for got, want in zip(everything(torch.where(kept, x, poison)), everything(x), strict=True):
        assert torch.equal(got, want)
    row, column = kept.nonzero()[7].tolist()
    x[row, column] = poison
    h, plain, panelled, dA = everything(x)
    assert not h[row].isfinite().any()
    assert not dA[:, column].isfinite().any()
    for spread in (plain, panelled):
        assert not spread[row, column].isfinite()
    rest = torch.arange(64) != row
    assert all(part[rest].isfinite().all() for part in (h, plain, panelled))


def test_a_nan_in_x_reaches_its_row_of_y_and_no_other():
    case, t = problem("dora", dropout=0.5, M=9)
    t["x"][4, 2] = float("nan")
    y = testing.ours(case, t)
    assert y[4].isnan().all()
    assert y[torch.arange(9) != 4].isfinite().all()


def test_a_zero_norm_gives_a_zero_gain_and_finite_gradients():
    case, t = problem("dora-inner")
    t["weight"][2], t["lora_B"][2] = 0, 0
    got = testing.run(testing.ours, case, t)
    assert torch.equal(got["y"][:, 2], t["bias"][2].expand(6))
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize(
    ("form", "exact"), [("dora-inner", True), ("dora-recompute", True), ("dora-output", False)]
)
def test_a_zero_magnitude(form, exact):
    case, t = problem(form, bias=False)
    t["magnitude"][4] = 0
    got, truth = testing.run(testing.ours, case, t), testing.run(testing.chain, case, t)
    want = truth["magnitude"].clone()
    if not exact:
        want[4] = 0
    torch.testing.assert_close(got["magnitude"], want, rtol=1e-11, atol=1e-12)


def test_a_tensor_scaling_is_a_number():
    case, t = problem("dora", dropout=0.3)
    for scale in (torch.tensor(1.7, dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)):
        got = testing.run(lambda case, t: testing.ours(replace(case, scaling=scale), t), case, t)  # noqa: B023
        want = testing.run(testing.ours, case, t)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["lora", "dora", "dora-in-both", "vera"])
def test_a_trained_weight_runs_on_plain_autograd(form):
    case, t = problem(form, dropout=0.3)
    leaves = {
        name: None if v is None or name == "seed" else v.detach().requires_grad_(name != "dy")
        for name, v in t.items()
    }
    testing.ours(case, leaves | {"seed": t["seed"]}).backward(t["dy"])
    truth = {
        name: None if v is None or name == "seed" else v.detach().requires_grad_(name != "dy")
        for name, v in t.items()
    }
    testing.chain(case, truth | {"seed": t["seed"]}).backward(t["dy"])
    for name in (*GRADIENTS, "weight"):
        if t[name] is not None:
            torch.testing.assert_close(leaves[name].grad, truth[name].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", ["lora", "dora-output", "dora-recompute"])
def test_gradients_are_equal_run_after_run(form):
    case, t = problem(form, dropout=0.3, dtype=torch.bfloat16, M=50)
    first, second = testing.run(testing.ours, case, t), testing.run(testing.ours, case, t)
    assert all(torch.equal(first[name], second[name]) for name in first)

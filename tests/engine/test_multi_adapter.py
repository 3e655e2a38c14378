"""Several LoRA adapters in one call: errors, saved tensors, and the op that torch sees."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from lorafast import functional, testing
from lorafast.engine import philox
from lorafast.engine.multi_adapter import Factors

pytestmark = pytest.mark.usefixtures("few_tokens_by_op")

RANKS, SCALINGS = (3, 1, 8), (0.5, 2.0, 1.3)
NAMES = ("lora_A", "lora_B", "lora_bias")


def problem(
    dtype=torch.float32,
    M=37,
    N=19,
    K=21,
    dropout=0.0,
    adapter_dtype=None,
    bias=True,
    lora_bias=True,
    seed=0,
):
    """x, dy, weight, bias, and A0, B0, … of three adapters, by name."""
    made, form = {}, testing.Form("lora", lora_bias=lora_bias)
    for i, R in enumerate(RANKS):
        case = testing.Case(form, M, N, K, R, dtype, dropout, bias, SCALINGS[i], adapter_dtype)
        tensors = testing.make(case, seed + i)
        made |= {f"{name}{i}": tensors[name] for name in (*NAMES, "seed")}
        made |= {name: tensors[name] for name in ("x", "dy", "weight", "bias") if i == 0}
    return made


def factors(t, dropout):
    return [
        Factors(*(t[f"{name}{i}"] for name in NAMES), t[f"seed{i}"], scaling=s, dropout=dropout)
        for i, s in enumerate(SCALINGS)
    ]


def ours(t, dropout):
    return functional.several(t["x"], t["weight"], t["bias"], factors(t, dropout))


def chain(t, dropout):
    x, dtype = t["x"], t["x"].dtype
    y = F.linear(x, t["weight"], t["bias"])
    for one in factors(t, dropout):
        dropped = x
        if dropout:
            dropped = (
                x
                * philox.keep_mask(one.seed, dropout, slice(0, x.shape[0]), x.shape[1])
                * philox.scale(dropout)
            )
        low = F.linear(F.linear(dropped, one.lora_A.to(dtype)), one.lora_B.to(dtype))
        low = low if one.lora_bias is None else low + one.lora_bias.to(dtype)
        y = y + low * one.scaling
    return y


def run(function, t, dropout, wide=False):
    """y and every gradient; the weight is frozen."""
    leaves = {}
    for name, value in t.items():
        if value is not None and value.is_floating_point():
            value = (
                (value.double() if wide else value)
                .detach()
                .requires_grad_(name not in ("weight", "dy"))
            )
        leaves[name] = value
    y = function(leaves, dropout)
    y.backward(leaves["dy"])
    return {"y": y.detach()} | {
        name: value.grad
        for name, value in leaves.items()
        if value is not None and value.is_floating_point() and value.requires_grad
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
    ],
)
@pytest.mark.parametrize("M", [1, 63, 257])
def test_it_errs_no_more_than_twice_what_the_chain_errs(
    M, dtype, adapter_dtype, lora_bias, dropout
):
    squares = {}
    # With one token and rank 1 a gradient hangs on the rounding of a single number: more draws say
    # how large it is.
    for seed in range(0, 48 if M == 1 else 12, 3):
        t = problem(
            dtype, M, dropout=dropout, adapter_dtype=adapter_dtype, lora_bias=lora_bias, seed=seed
        )
        truth, found, eager = (
            run(chain, t, dropout, True),
            run(ours, t, dropout),
            run(chain, t, dropout),
        )
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert found[name].dtype == t.get(name, t["x"]).dtype
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, one in enumerate((found[name], eager[name])):
                sums[i] += (one - value).square().sum().item()
            sums[2] += value.square().sum().item()
    floor = torch.finfo(dtype).eps / 8
    ratios = {
        name: testing.ratio(*(value**0.5 for value in sums), floor)
        for name, sums in squares.items()
    }
    assert max(ratios.values()) <= 2, ratios


def test_one_adapter_is_linear_itself():
    t = problem(dropout=0.3)
    one = factors(t, 0.3)[:1]
    want = functional.linear(
        t["x"],
        t["weight"],
        t["bias"],
        t["lora_A0"],
        t["lora_B0"],
        lora_bias=t["lora_bias0"],
        scaling=0.5,
        dropout=0.3,
        seed=t["seed0"],
    )
    assert torch.equal(functional.several(t["x"], t["weight"], t["bias"], one), want)


def test_masks_are_drawn_in_order_and_only_in_training():
    t = problem(dropout=0.3)
    unseeded = [one._replace(seed=None) for one in factors(t, 0.3)]
    torch.manual_seed(5)
    seeds = [philox.draw_seed(torch.device("cpu")) for _ in unseeded]
    torch.manual_seed(5)
    drawn = functional.several(t["x"], t["weight"], t["bias"], unseeded)
    given = [one._replace(seed=seed) for one, seed in zip(unseeded, seeds, strict=True)]
    assert torch.equal(drawn, functional.several(t["x"], t["weight"], t["bias"], given))
    rested = functional.several(t["x"], t["weight"], t["bias"], unseeded, training=False)
    assert torch.equal(rested, functional.several(t["x"], t["weight"], t["bias"], factors(t, 0.0)))


@pytest.mark.parametrize(
    "trained",
    [
        (),
        ("lora_B1",),
        ("lora_A2",),
        ("x", "lora_B0"),
        ("bias", "lora_bias1"),
        ("lora_A0", "lora_B2"),
    ],
)
def test_only_the_gradients_asked_for_and_only_what_they_need_is_kept(trained):
    t = problem()
    leaves = {
        name: value.detach().requires_grad_(name in trained) if value.is_floating_point() else value
        for name, value in t.items()
    }
    kept = testing.saved(
        lambda: ours(leaves, 0.0),
        {"x": leaves["x"]},
        [value for name, value in leaves.items() if name not in ("x", "dy")],
    )
    ranks = [R for i, R in enumerate(RANKS) if f"lora_B{i}" in trained]
    assert kept.own == 37 * sum(ranks) * 4
    assert kept.referenced == (
        {"x"} if any(name.startswith("lora_A") for name in trained) else set()
    )
    y = ours(leaves, 0.0)
    assert y.requires_grad == bool(trained)
    if trained:
        y.backward(t["dy"])
        want = run(chain, t, 0.0)
        for name, value in leaves.items():
            if name in trained:
                torch.testing.assert_close(value.grad, want[name], rtol=1e-4, atol=1e-5)
            else:
                assert not value.is_floating_point() or value.grad is None


@pytest.mark.parametrize("shape", [(0, 21), (2, 0, 21), (21,), (2, 3, 21)])
def test_any_shape_of_x(shape):
    t = problem(dropout=0.3) | {"x": torch.randn(shape, requires_grad=True)}
    y = ours(t, 0.3)
    assert y.shape == (*shape[:-1], 19)
    assert y._base is None
    y.sum().backward()
    assert t["x"].grad.shape == shape


def test_torch_sees_an_op():
    t = problem(dropout=0.3)
    lists = list(
        map(list, zip(*(one._replace(dropout=0.3) for one in factors(t, 0.3)), strict=True))
    )
    for name in ("x", "bias"):
        t[name] = t[name].detach().requires_grad_()
    for some in lists[:3]:
        some[:] = [one.detach().requires_grad_() for one in some]
    opcheck(torch.ops.lorafast.several, (t["x"], t["weight"], t["bias"], *lists))


@pytest.mark.compile
def test_any_batch_size_is_one_graph_once_the_first_has_changed():
    t, graphs = problem(), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: functional.several(x, t["weight"], t["bias"], factors(t, 0.0)),
        backend=counting,
        fullgraph=True,
    )
    for M in (2, 3, 5, 8, 13, 21):
        compiled(torch.randn(M, 21))
    assert len(graphs) == 2


def test_autocast_decides_the_dtype():
    t = problem()
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.several(t["x"], t["weight"], t["bias"], factors(t, 0.0))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(t, 0.0), rtol=5e-2, atol=1e-1)
    leaf = t["x"].detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        functional.several(leaf, t["weight"], t["bias"], factors(t, 0.0)).float().sum().backward()
    assert leaf.grad.dtype == torch.float32


def test_lora_bias_may_change_before_backward():
    t = problem()
    low = t["lora_bias1"].detach().clone().requires_grad_()
    adapters = [
        one._replace(lora_bias=low) if i == 1 else one for i, one in enumerate(factors(t, 0.0))
    ]
    y = functional.several(t["x"], t["weight"], t["bias"], adapters)
    with torch.no_grad():
        low.add_(1)
    y.backward(t["dy"])
    torch.testing.assert_close(low.grad, t["dy"].sum(0) * SCALINGS[1])


def test_a_frozen_call_asks_nothing_of_a_trained_weight():
    t = problem()
    weight = t["weight"].detach().requires_grad_()
    with torch.no_grad():
        assert torch.equal(
            functional.several(t["x"], weight, t["bias"], factors(t, 0.0)), ours(t, 0.0)
        )


@pytest.mark.compile
def test_it_compiles_whole():
    t = {
        name: value.detach().requires_grad_(name != "weight")
        if value.is_floating_point()
        else value
        for name, value in problem().items()
    }
    compiled = torch.compile(lambda t: ours(t, 0.3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), ours(t, 0.3))


def test_a_tensor_scaling_is_read_when_it_is_called():
    t = problem()
    scaled = [one._replace(scale=torch.tensor(one.scaling), scaling=7.0) for one in factors(t, 0.0)]
    torch.testing.assert_close(
        functional.several(t["x"], t["weight"], t["bias"], scaled), ours(t, 0.0)
    )


def test_what_cannot_be_is_refused_in_words():
    t = problem()
    x, weight, bias = t["x"], t["weight"], t["bias"]
    with pytest.raises(ValueError, match=r"adapters is empty; weight \(19, 21\)"):
        functional.several(x, weight, bias, [])
    with pytest.raises(ValueError, match=r"weight \(19, 21\) and tensor scalings must be frozen"):
        functional.several(x, weight.detach().requires_grad_(), bias, factors(t, 0.0))
    with pytest.raises(ValueError, match=r"lora_B \(18, 3\)"):
        functional.several(x, weight, bias, [factors(t, 0.0)[0]._replace(lora_B=t["lora_B0"][1:])])
    leaf = x.detach().requires_grad_()
    y = functional.several(leaf, weight, bias, factors(t, 0.0))
    with pytest.raises(RuntimeError, match="double backward unsupported"):
        torch.autograd.grad(y.square().sum(), leaf, create_graph=True)

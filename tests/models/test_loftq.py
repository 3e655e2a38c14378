"""quantize_base(loftq=...): the alternation against one in fp64, what it starts and refuses."""

import copy

import pytest
import torch
from torch import nn

import lorafast
from lorafast.quantised import formats

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")
BITS = ["fp8", pytest.param("nf4", marks=needs_bnb), pytest.param("int8", marks=needs_bnb)]
K, N, R = 64, 128, 8


def dense(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 64, bias=False)).to(dtype)


def stored(module):
    weight = formats.of(module)
    return weight.whole(torch.empty(weight.shape)).double()


def alternated(linear, bits, r, scaling, iterations):
    """Q and s·BA of the paper's algorithm 1, the SVD in fp64."""
    W = linear.weight.detach().double()
    low_rank = torch.zeros_like(W)
    for _ in range(iterations):
        model = nn.Sequential(copy.deepcopy(linear))
        model[0].weight.data.copy_(W - low_rank)
        lorafast.quantize_base(model, bits)
        Q = stored(model[0])
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        low_rank = (U[:, :r] * S[:r]) @ Vh[:r]
    return Q, low_rank


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_is_the_papers_alternation(bits, iterations, rslora):
    model = dense()
    first = copy.deepcopy(model[0])
    adapter = lorafast.LoRA(r=R, alpha=4, rslora=rslora)
    Q, low_rank = alternated(first, bits, R, adapter.scaling, iterations)
    report = lorafast.quantize_base(model, bits, loftq=adapter, iterations=iterations)
    layer = model[0]
    assert layer.adapter == adapter
    found = adapter.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    W = first.weight.detach().double()
    start = (stored(layer.base_layer) + found - W).norm() / W.norm()
    assert report.layers["0"].error == pytest.approx(start.item(), rel=1e-4)
    if iterations == 1:
        assert torch.equal(stored(layer.base_layer), Q)
        torch.testing.assert_close(found, low_rank, rtol=1e-3, atol=1e-3 * low_rank.abs().max())
    # A number at the edge of two codes may fall to either side in a later iteration.
    else:
        right = (Q + low_rank - W).norm() / W.norm()
        assert start.item() == pytest.approx(right.item(), rel=0.01)


@pytest.mark.parametrize("bits", BITS)
def test_it_lowers_the_error_and_the_model_starts_nearer(bits):
    plain, started, original = dense(), dense(), dense()
    without = lorafast.quantize_base(plain, bits)
    report = lorafast.quantize_base(started, bits, loftq=lorafast.LoRA(r=R))
    for name, layer in report.layers.items():
        assert layer.error < 0.95 * without.layers[name].error
        assert layer.bytes_after == without.layers[name].bytes_after
    lorafast.adapt(plain, lorafast.LoRA(r=R))
    x = torch.randn(64, K)
    y = original(x)
    assert (started(x) - y).norm() < (plain(x) - y).norm()


def test_more_iterations_lower_it_further():
    errors = [
        lorafast.quantize_base(dense(), "fp8", loftq=lorafast.LoRA(r=32), iterations=n).layers["0"]
        for n in (1, 5)
    ]
    assert errors[1].error < errors[0].error


def test_it_trains_and_its_file_is_that_of_a_lora_on_the_same_weights(tmp_path):
    model = dense(torch.bfloat16)
    lorafast.quantize_base(model, "fp8", loftq=lorafast.LoRA(r=R, lora_bias=True), seed=1)
    x = torch.randn(8, K, dtype=torch.bfloat16)
    model(x).square().sum().backward()
    assert model[0].lora_A.grad.norm() > 0
    assert model[0].lora_A.dtype == torch.float32
    lorafast.save_adapter(model, tmp_path)
    again = dense(torch.bfloat16)
    lorafast.quantize_base(again, "fp8")
    lorafast.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("bits", BITS)
def test_the_weights_of_several_iterations_are_made_again_for_the_file(bits, tmp_path):
    def started():
        model = dense()
        lorafast.quantize_base(model, bits, loftq=lorafast.LoRA(r=R), iterations=3)
        return model

    model, x = started(), torch.randn(8, K)
    nn.init.normal_(model[0].lora_A)
    lorafast.save_adapter(model, tmp_path)
    assert torch.equal(lorafast.load_adapter(started(), tmp_path)(x), model(x))


def test_adapts_options_reach_it():
    model = dense().append(nn.LayerNorm(64))
    lorafast.quantize_base(
        model, "fp8", ["0", "2"], exclude_modules=["2"], loftq=lorafast.LoRA(r=R),
        rank_pattern={"0": 4}, modules_to_save=["3"], adapter_dtype=torch.float32,
    )  # fmt: skip
    assert model[0].lora_A.shape == (4, K)
    assert type(model[2]) is nn.Linear
    assert model[3].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"loftq": lorafast.DoRA(r=2)}, TypeError, r"loftq=DoRA\(r=2.* must be a lorafast\.LoRA"),
        ({"loftq": 4}, TypeError, "loftq=4 must be"),
        (
            {"loftq": lorafast.LoRA(r=2, init=lorafast.PiSSA())},
            TypeError,
            "without an init of its own",
        ),
        ({"loftq": lorafast.LoRA(r=65)}, ValueError, r"0: r=65 exceeds min\(N, K\)=64"),
        ({"loftq": lorafast.LoRA(r=2, alpha=0)}, ValueError, "0: LoftQ starts a LoRA with a pos"),
        ({"loftq": lorafast.LoRA(r=2), "iterations": 0}, ValueError, "iterations=0 must be"),
        ({"loftq": lorafast.LoRA(r=2), "modules_to_save": ["9"]}, ValueError, "9"),
        ({"loftq": lorafast.LoRA(r=2), "rank_pattern": {"9": 2}}, ValueError, "9"),
        ({"loftq": lorafast.LoRA(r=2), "ranks": 3}, TypeError, "ranks"),
        ({"seed": 1}, TypeError, r"seed: arguments of lorafast\.adapt, without loftq"),
    ],
    ids=str,
)
def test_what_is_refused_changes_nothing(options, error, why):
    model = dense()
    layers = [*model]
    with pytest.raises(error, match=why):
        lorafast.quantize_base(model, "fp8", **options)
    assert [*model] == layers

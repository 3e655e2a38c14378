"""DoRA's variants: the exact gradient, and the magnitude alone in layers, models and files."""

import json

import pytest
import torch
from helpers import tiny_transformers
from helpers.adapter_folders import net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA, testing

K, N = 6, 5
ALONE = DoRA(magnitude_only=True)

EXACT = {
    "scaled": DoRA(r=2, alpha=5, detach_norm=False),
    "inner": DoRA(r=2, alpha=5, detach_norm=False, keep="inner"),
    "recompute": DoRA(r=2, alpha=-3, detach_norm=False, keep="recompute", lora_bias=True),
    "in": DoRA(r=2, alpha=5, detach_norm=False, axis="in"),
    "pissa": DoRA(r=2, alpha=3, detach_norm=False, init=PiSSA()),
    "pissa-in": DoRA(r=2, alpha=3, detach_norm=False, init=PiSSA(), axis="in"),
    "dropout": DoRA(r=2, alpha=5, detach_norm=False, dropout=0.3),
    "dropout-both": DoRA(r=2, alpha=5, detach_norm=False, dropout=0.3, dropout_on="both"),
    "dropout-in": DoRA(r=2, alpha=5, detach_norm=False, dropout=0.3, axis="in"),
    "dropout-in-both": DoRA(
        r=2, alpha=5, detach_norm=False, dropout=0.3, axis="in", dropout_on="both"
    ),
}


@pytest.mark.parametrize(
    ("kind", "bias"), [*((kind, True) for kind in EXACT), ("scaled", False), ("in", False)]
)
def test_the_exact_gradient_by_finite_differences(kind, bias):
    layer = lorafast.Linear(K, N, bias, adapter=EXACT[kind], dtype=torch.float64)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    leaves = [
        layer.get_parameter(name).detach() + 0.2 * torch.randn(layer.get_parameter(name).shape)
        for name in names
    ]
    x = torch.randn(3, K, dtype=torch.float64)

    def function(x, *values):
        torch.manual_seed(3)  # of the dropout
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in (x, *leaves)])


def test_the_detached_gradient_is_another():
    layer = lorafast.Linear(K, N, adapter=DoRA(r=2), dtype=torch.float64)

    def function(B):
        return functional_call(layer, {"lora_B": B}, torch.ones(3, K, dtype=torch.float64))

    B = torch.randn(N, 2, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.gradcheck(function, [B], raise_exception=False)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("exact", [False, True])
def test_dora_on_pissa_starts_as_the_layer_it_was(axis, exact):
    base = nn.Linear(K, N, dtype=torch.float64)
    W, x = base.weight.detach().clone(), torch.randn(4, K, dtype=torch.float64)
    want = base(x)
    model = lorafast.adapt(
        nn.Sequential(base), DoRA(r=2, alpha=3, init=PiSSA(), axis=axis, detach_norm=not exact)
    )
    torch.testing.assert_close(model[0].magnitude.detach(), W.norm(dim=1 if axis == "out" else 0))
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        ALONE,
        *(
            DoRA(magnitude_only=True, **f)
            for f in (
                {"axis": "in"},
                {"keep": "inner"},
                {"keep": "recompute"},
                {"cache_norm": True},
                {"detach_norm": False},
            )
        ),
    ],
    ids=repr,
)
def test_the_magnitude_alone(adapter, bias):
    base = nn.Linear(K, N, bias, dtype=torch.float64)
    x = torch.randn(7, K, dtype=torch.float64, requires_grad=True)
    layer = lorafast.Linear.from_linear(base, adapter)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-13, atol=1e-13)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == [
        "lora_magnitude"
    ]
    with torch.no_grad():
        layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    dy = torch.randn(7, N, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, layer.magnitude], dy)
    m = layer.magnitude.detach().clone().requires_grad_()
    W = layer.weight
    y = (
        m / W.norm(dim=1) * (x @ W.t())
        if adapter.axis == "out"
        else (m / W.norm(dim=0) * x) @ W.t()
    )
    for a, b in zip(got, torch.autograd.grad(y, [x, m], dy), strict=True):
        torch.testing.assert_close(a, b)
    want = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("keep", "bias", "own", "referenced"),
    [
        ("auto", False, None, None),
        ("output", True, 0, {"y"}),
        ("inner", True, 24 * N, set()),
        ("inner", False, 24 * N, set()),
        ("recompute", False, 24, {"x"}),
    ],
)
def test_neither_x_nor_h_is_saved(keep, bias, own, referenced, dtype):
    if own is None:
        own, referenced = (24 * N, set()) if dtype == torch.float16 else (0, {"y"})
    layer = lorafast.Linear(K, N, bias, adapter=DoRA(magnitude_only=True, keep=keep), dtype=dtype)
    x = torch.randn(24, K, dtype=dtype, requires_grad=True)
    saved = testing.saved(lambda: layer(x), {"x": x}, layer.parameters())
    assert saved == testing.Saved(own * dtype.itemsize + 4 * N, frozenset(referenced))


def test_an_embedding_can_have_it_too():
    layer = lorafast.Embedding(9, 4, adapter=ALONE, dtype=torch.float64)
    ids = torch.tensor([0, 3, 8])
    torch.testing.assert_close(layer(ids), layer.weight[ids])
    layer(ids).sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == [
        "lora_magnitude"
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"init": PiSSA()},
        {"init": "gaussian"},
        {"freeze_A": True},
        {"lora_bias": True},
        {"rslora": True},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_speaks_of_factors_is_refused_without_them(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"magnitude_only=True: there are no factors for {name}="):
        DoRA(magnitude_only=True, **fields)
    assert DoRA(r=7, alpha=3, **fields).without_factors() == DoRA(magnitude_only=True)
    assert (
        DoRA(magnitude_only=True, dropout=0.1, dropout_on="both").without_factors().dropout == 0.1
    )


def test_rank_and_alpha_are_one():
    assert (
        repr(DoRA(r=16, alpha=32, magnitude_only=True)) == "DoRA(r=1, alpha=1, magnitude_only=True)"
    )
    with pytest.raises(ValueError, match="r=0 must be"):
        DoRA(r=0, magnitude_only=True)


MIXED = {"adapter_pattern": {"mlp.*|fc": ALONE}}


@pytest.mark.peft
def test_some_layers_with_the_magnitude_alone_through_a_file_and_peft(tmp_path):
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), DoRA(r=4, alpha=8), rank_pattern={"q_proj": 2}, **MIXED
    )
    specs = {
        name: layer.adapter
        for name, layer in model.named_modules()
        if isinstance(layer, lorafast.Linear)
    }
    assert {spec.magnitude_only for name, spec in specs.items() if "mlp" in name} == {True}
    assert {spec.r for name, spec in specs.items() if "q_proj" in name} == {2}
    assert sum(spec == DoRA(r=4, alpha=8) for spec in specs.values()) == 6
    want = tiny_transformers.outputs(model)
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
    assert torch.equal(tiny_transformers.outputs(loaded), want)
    assert {
        name: layer.adapter
        for name, layer in loaded.named_modules()
        if isinstance(layer, lorafast.Linear)
    } == specs
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    again = lorafast.adapt(
        tiny_transformers.llama(), DoRA(r=4, alpha=8), rank_pattern={"q_proj": 2}, **MIXED
    )
    assert torch.equal(tiny_transformers.outputs(lorafast.load_adapter(again, tmp_path)), want)
    whole = lorafast.adapt(
        tiny_transformers.llama(),
        DoRA(r=4, alpha=8),
        rank_pattern={"q_proj": 2, "mlp.*": 1},
        alpha_pattern={"mlp.*": 1},
    )
    with pytest.raises(
        ValueError,
        match=r"mlp\.gate_proj has DoRA\(r=1, alpha=1\).*"
        r"the file DoRA\(r=1, alpha=1, magnitude_only",
    ):
        lorafast.load_adapter(whole, tmp_path)
    theirs = tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path)
    torch.testing.assert_close(tiny_transformers.outputs(theirs), want, rtol=1e-4, atol=2e-5)


@pytest.mark.peft
def test_the_magnitude_alone_everywhere_stays_alone_in_peft(tmp_path):
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), ALONE, target_modules=["q_proj", "down_proj"]
    )
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path)
    assert {layer.adapter for layer in loaded.modules() if isinstance(layer, lorafast.Linear)} == {
        ALONE
    }
    assert torch.equal(tiny_transformers.outputs(loaded), tiny_transformers.outputs(model))
    theirs = tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora" in name)
    theirs(input_ids=tiny_transformers.IDS)[0].square().sum().backward()
    moved = {
        name: bool(parameter.grad.any())
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    assert {moves for name, moves in moved.items() if "magnitude" in name} == {True}
    assert {moves for name, moves in moved.items() if "magnitude" not in name} == {False}


def test_methods_can_mix_but_not_in_a_file(tmp_path):
    model = lorafast.adapt(
        net(),
        LoRA(r=2),
        adapter_pattern={"2": LaMDA(r=3), "3": DoRA(r=2, init=PiSSA())},
        alpha_pattern={"2": 9},
    )
    assert [type(model[i].adapter).__name__ for i in (0, 2, 3)] == ["LoRA", "LaMDA", "DoRA"]
    assert model[2].adapter == LaMDA(r=3, alpha=9)
    with pytest.raises(ValueError, match="may differ in r and alpha"):
        lorafast.save_adapter(model, tmp_path / "out")
    pissa = lorafast.adapt(net(), DoRA(r=2, init=PiSSA()), adapter_pattern={"0": ALONE})
    with pytest.raises(ValueError, match="without an init that changes the weight"):
        lorafast.save_adapter(pissa, tmp_path / "out")
    lorafast.save_adapter(pissa, tmp_path / "plain", as_lora=True, rank=4)


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ({"7": ALONE}, ValueError, "adapter_pattern: '7' matches no adapted layer"),
        ({"(": ALONE}, ValueError, r"adapter_pattern='\(' is no regular expression"),
        (
            {"0": 3},
            TypeError,
            "adapter_pattern=.* must be a dict from regular expressions to lorafast adapters",
        ),
        ([ALONE], TypeError, "adapter_pattern="),
        ({"0": VeRA(r=2)}, ValueError, "all layers of VeRA share tensors"),
    ],
)
def test_patterns_that_are_none(pattern, error, message):
    model = net()
    with pytest.raises(error, match=message):
        lorafast.adapt(model, DoRA(r=2), adapter_pattern=pattern)
    assert not any(isinstance(module, lorafast.Linear) for module in model.modules())


@pytest.mark.parametrize("names", [["9"], "0", [3], [["0"]], {"0": 1}])
def test_a_file_that_names_other_layers(names, tmp_path):
    lorafast.save_adapter(lorafast.adapt(net(), DoRA(r=2), adapter_pattern={"0": ALONE}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    extras = json.loads(metadata["lorafast"])
    assert extras["magnitude_only"] == ["0"]
    save_file(
        load_file(path),
        path,
        metadata=metadata | {"lorafast": json.dumps(extras | {"magnitude_only": names})},
    )
    model = net()
    with pytest.raises(ValueError, match=r"magnitude_only=.* must be names of layers in the file"):
        lorafast.load_adapter(model, tmp_path)
    assert not any(isinstance(module, lorafast.Linear) for module in model.modules())

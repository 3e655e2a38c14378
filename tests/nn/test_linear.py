"""lorafast.Linear as a module: construction, dtypes, gradients, odd shapes, refusals."""

import dataclasses

import pytest
import torch
from helpers.adapter_layers import K, N, inputs, trained_layer
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.methods.adapter import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")


def test_names_shapes_and_properties():
    layer = lorafast.Linear(K, N, bias=False, adapter=DoRA(r=3, alpha=6))
    assert [name for name, _ in layer.named_parameters()] == [
        "weight",
        "lora_A",
        "lora_B",
        "lora_magnitude",
    ]
    assert layer.lora_A.shape == (3, K)
    assert layer.lora_B.shape == (N, 3)
    assert layer.magnitude is layer.lora_magnitude
    assert layer.core is None
    assert layer.out_scale is None
    assert (layer.r, layer.scaling, layer.adapter.alpha, layer.merged, layer.bias) == (
        3,
        2.0,
        6,
        False,
        None,
    )
    lamda = lorafast.Linear(K, N, adapter=LaMDA(r=3))
    assert lamda.core is lamda.lora_core
    assert lamda.core.shape == (3, 3)
    assert isinstance(layer, nn.Linear)
    shown = "in_features=10, out_features=14, bias=False, adapter=DoRA(r=3, alpha=6)"
    assert repr(layer) == f"Linear(\n  {shown}\n  (lora_dropout): Identity()\n)"
    layer.merge()
    assert f"{shown}, merged\n" in repr(layer)
    assert repr(lorafast.Linear(K, N).adapter) == "LoRA(r=8, alpha=8)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapter_dtype(dtype):
    expected = torch.float32 if dtype.itemsize == 2 else dtype
    layer = lorafast.Linear(K, N, adapter=DoRA(r=3), dtype=dtype)
    assert {p.dtype for name, p in layer.named_parameters() if name.startswith("lora")} == {
        expected
    }
    assert layer(inputs(dtype)).dtype == dtype
    assert (
        lorafast.Linear(K, N, dtype=dtype, adapter_dtype=torch.bfloat16).lora_A.dtype
        == torch.bfloat16
    )
    assert {p.dtype for p in layer.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_from_linear_keeps_the_mode():
    assert not lorafast.Linear.from_linear(nn.Linear(K, N).eval()).training
    assert lorafast.Linear.from_linear(nn.Linear(K, N)).training


@pytest.mark.parametrize("detach", [True, False])
def test_the_layers_gradients_are_the_formulas(detach):
    layer = trained_layer(DoRA(r=3, detach_norm=detach), dtype=torch.float64)
    x, leaves = inputs(torch.float64), [layer.lora_A, layer.lora_B, layer.lora_magnitude]
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    norm = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1)
    gain = layer.magnitude / (norm.detach() if detach else norm)
    y = (
        gain * (x @ layer.weight.t() + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t())
        + layer.bias
    )
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_exact_norm_with_a_trained_weight_is_exact_too():
    layer = trained_layer(DoRA(r=3, detach_norm=False), dtype=torch.float64)
    layer.weight.requires_grad_(True)
    layer.scaling = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    x, leaves = (
        inputs(torch.float64),
        [layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.scaling],
    )
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    y = layer.magnitude / V.norm(dim=1) * (x @ V.t()) + layer.bias
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("N", "K"), [(0, 4), (4, 0)])
@pytest.mark.parametrize(
    "adapter", [LoRA(r=2, dropout=0.5), DoRA(r=2), DoRA(r=2, axis="in")], ids=repr
)
def test_layers_without_outputs_or_inputs(adapter, N, K):
    layer = lorafast.Linear(K, N, adapter=adapter)
    y = layer(torch.randn(3, K, requires_grad=True))
    y.sum().backward()
    assert y.shape == (3, N)


def test_a_bias_that_is_not_read_again_may_change():
    layer = trained_layer(LoRA(r=3))
    y = layer(inputs())
    with torch.no_grad():
        layer.bias.add_(1)
    y.sum().backward()


def test_merging_leaves_a_bias_alone_that_it_does_not_need():
    layer = trained_layer(LoRA(r=3))
    layer.merge()
    with torch.no_grad():
        layer.bias.add_(5)
    after = layer.bias.clone()
    layer.unmerge()
    assert torch.equal(layer.bias, after)


def test_a_residual_start_on_a_shared_weight_warns():
    with pytest.warns(
        UserWarning, match=r"\(14, 10\) shared with the linear now holds the residual"
    ):
        lorafast.Linear.from_linear(nn.Linear(K, N), LaMDA(r=3))


def test_refusals_leave_the_linear_as_it_was():
    base = nn.Linear(K, N)
    before = base.weight.clone()
    for wrong, message in (
        (LaMDA(r=11), r"r=11 exceeds min\(N, K\)=10 of weight \(14, 10\)"),
        ("lora", "adapter must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            lorafast.Linear.from_linear(base, wrong)
    assert base.weight.requires_grad
    assert torch.equal(base.weight, before)
    with pytest.raises(TypeError, match=r"plain torch\.nn\.Linear"):
        lorafast.Linear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match=r"plain torch\.nn\.Linear"):
        lorafast.Linear.from_linear(lorafast.Linear(K, N))
    twice = type(
        "Twice", (nn.Linear,), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)}
    )
    for own_forward in (twice(K, N), nn.utils.parametrizations.weight_norm(nn.Linear(K, N))):
        with pytest.raises(
            TypeError,
            match=r"plain torch\.nn\.Linear.* this one is a \S*(Twice|ParametrizedLinear)",
        ):
            lorafast.Linear.from_linear(own_forward)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(TypeError, match="adapter_dtype"):
            lorafast.Linear(K, N, adapter_dtype=dtype)


def test_a_second_residual_start_on_a_shared_weight_is_refused():
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    first = lorafast.Linear.from_linear(base, LaMDA(r=3))
    lorafast.Linear.from_linear(base, LoRA(r=3))  # takes nothing out, and does not lift the mark
    with pytest.raises(
        ValueError, match=r"weight \(14, 10\) already holds the residual.*init='zero'"
    ):
        lorafast.Linear.from_linear(base, LaMDA(r=3))
    torch.testing.assert_close(first(x), want, rtol=1e-5, atol=1e-6)
    first.load_state_dict(nn.Linear(K, N).state_dict())
    first.reset_adapter()


def test_a_method_that_names_its_parts_wrongly_is_told():
    @dataclasses.dataclass(frozen=True)
    class Misnamed(LoRA):
        def tensor_specs(self, N, K):
            return super().tensor_specs(N, K) | {"core": TensorSpec((self.r,))}

    @dataclasses.dataclass(frozen=True)
    class Forgetful(LoRA):
        def init_tensors(self, weight):
            return {"lora_A": super().init_tensors(weight)["lora_A"]}

    with pytest.raises(TypeError, match=r"tensor_specs\(\): core not among lora_A"):
        lorafast.Linear(K, N, adapter=Misnamed())
    with pytest.raises(TypeError, match=r"init_tensors\(\) gives \['lora_A'\]"):
        lorafast.Linear(K, N, adapter=Forgetful())


def test_a_trained_weight_gets_its_gradient():
    layer = trained_layer(DoRA(r=3))
    layer.weight.requires_grad_(True)
    layer(inputs()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.lora_magnitude.grad is not None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_linear_with_a_tensor_for_a_parameter_is_refused(name):
    linear = nn.Linear(6, 5)
    value = getattr(linear, name).detach()
    delattr(linear, name)
    setattr(linear, name, value)
    with pytest.raises(TypeError, match=f"whose {name} is no Parameter"):
        lorafast.Linear.from_linear(linear)

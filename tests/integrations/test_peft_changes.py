"""An accelerated layer that is changed between two calls gives what PEFT's own forward gives then.

On the host path, where C++ reads the layer, and on the Python path.
"""

import copy
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from helpers import host_path
from helpers.peft_models import K, N, X, add_second_adapter, assert_same, peft_model
from torch import nn

import lorafast
from lorafast.integrations import peft_calls, peft_support
from lorafast.integrations import peft_linear as ours

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("few_tokens_by_op")]
PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout")
HOOKS = ("register_forward_hook", "register_forward_pre_hook")


@pytest.fixture(params=["host", "python"])
def by_host(request, monkeypatch):
    """True if the host path serves what is usual; then Python reads no layer that is."""
    if request.param == "host":
        host_path.ready()
        return True
    request.getfixturevalue("calls_by_python")
    return False


@pytest.fixture
def read_by_python(monkeypatch):
    """A list with an entry for each layer that Python reads."""
    found, usual_call = [], peft_calls.usual_call
    monkeypatch.setattr(
        peft_calls, "usual_call", lambda layer: found.append(1) or usual_call(layer)
    )
    return found


def layer_of(**fields):
    model = peft_model(**{"targets": ["up"], "lora_dropout": 0.3} | fields).eval()
    add_second_adapter(model)
    model.base_model.set_adapter("default")
    lorafast.accelerate(model)
    return model.eval().base_model.model.up


def part(layer, name):
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


def factor(shape, **options):
    return nn.Parameter(torch.randn(shape) / 8, **options)


def of_another_class(layer):
    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    base = Quantised(K, N)
    base.requires_grad_(False)
    layer.base_layer = base


def of_another_class_in_place(layer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.lora_B["default"].__class__ = Doubled


def of_another_parameter(layer):
    class Mine(nn.Parameter):
        pass

    layer.base_layer.weight = Mine(torch.randn(N, K) / 8, requires_grad=False)


def with_own_forward(name):
    def change(layer):
        module = part(layer, name)
        forward = module.forward
        module.forward = lambda x: 2 * forward(x)

    return change


def gathered(layer):
    """As a library does that shards parameters: an entry is there once it is read."""

    class Gathering(dict):
        def __getitem__(self, name):
            return {"weight": weight, "bias": bias}[name]

    base = layer.base_layer
    weight, bias = factor((N, K), requires_grad=False), factor(N, requires_grad=False)
    base.__dict__["_parameters"] = Gathering(base._parameters)


def with_dora(layer):
    variant = peft_support.DoraLinearVariant()
    variant.init(layer, "default")
    layer.lora_variant["default"] = variant


def scaled_by_a_tensor(layer):
    layer.scaling["default"] = torch.tensor(0.7)


# What is changed, and if a call is served on the ops afterwards.
CHANGES = {
    "another adapter": (lambda layer: layer.set_adapter(["other"]), True),
    "its name alone": (lambda layer: setattr(layer, "_active_adapter", "other"), True),
    "two adapters": (lambda layer: layer.set_adapter(["default", "other"]), True),
    "an adapter it lacks": (lambda layer: setattr(layer, "_active_adapter", ["third"]), False),
    "one more that it lacks": (
        lambda layer: setattr(layer, "_active_adapter", ["default", "third"]),
        True,
    ),
    "deleted": (lambda layer: layer.delete_adapter("default"), True),
    "all deleted": (lambda layer: [layer.delete_adapter(n) for n in ("default", "other")], False),
    "disabled": (lambda layer: layer.enable_adapters(False), False),
    "merged": (lambda layer: layer.merge(), False),
    "merged and unmerged": (lambda layer: (layer.merge(), layer.unmerge()), True),
    "scale": (lambda layer: layer.set_scale("default", 3.0), True),
    "scale_layer": (lambda layer: layer.scale_layer(0.5), True),
    "unscale_layer": (lambda layer: (layer.scale_layer(0.5), layer.unscale_layer(0.25)), True),
    "a tensor as its scaling": (scaled_by_a_tensor, True),
    "no scaling at all": (lambda layer: layer.scaling.update(default=0), True),
    "no casts": (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), False),
    "a variant": (with_dora, True),
    "dropout left out": (
        lambda layer: layer.lora_dropout.update({"default": nn.Identity()}),
        True,
    ),
    "another dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1).eval()}),
        False,
    ),
    "p": (lambda layer: (layer.train(), setattr(part(layer, "lora_dropout"), "p", 0.0)), True),
    "the base weight": (
        lambda layer: setattr(layer.base_layer, "weight", factor((N, K), requires_grad=False)),
        True,
    ),
    "the base weight's data": (
        lambda layer: setattr(layer.base_layer.weight, "data", factor((N, K)).data),
        True,
    ),
    "a base weight that trains": (
        lambda layer: layer.base_layer.weight.requires_grad_(True),
        False,
    ),
    "a base weight of another class": (of_another_parameter, False),
    "a gathered base weight": (gathered, True),
    "no base bias": (lambda layer: setattr(layer.base_layer, "bias", None), True),
    "A and B": (
        lambda layer: (
            setattr(layer.lora_A["default"], "weight", factor((6, K))),
            setattr(layer.lora_B["default"], "weight", factor((N, 6))),
        ),
        True,
    ),
    "a bias of B": (lambda layer: setattr(layer.lora_B["default"], "bias", factor(N)), True),
    "a bias of A": (lambda layer: setattr(layer.lora_A["default"], "bias", factor(4)), False),
    "another module as A": (
        lambda layer: layer.lora_A.update({"default": nn.Linear(K, 4, bias=False)}),
        True,
    ),
    "B of another class": (of_another_class_in_place, False),
    "a quantised base": (of_another_class, False),
    "a base that is offloaded": (lambda layer: setattr(layer.base_layer, "_hf_hook", 1), False),
    **{f"a forward of {name}'s own": (with_own_forward(name), False) for name in PARTS},
    **{
        f"a hook in {name} by hand": (
            lambda layer, name=name: part(layer, name)._forward_hooks.update(
                {0: lambda module, x, y: 2 * y}
            ),
            False,
        )
        for name in PARTS
    },
    "all hooks by hand": (
        lambda layer: setattr(
            layer.base_layer, "_forward_hooks", OrderedDict({0: lambda module, x, y: 2 * y})
        ),
        False,
    ),
}  # fmt: skip


def assert_pefts(layer, x=X):
    """A call gives what PEFT's forward gives, and the same gradients."""
    found = []
    for forward in (layer, lambda x: ours.PeftLinear.forward(layer, x)):
        layer.zero_grad()
        own_x = x.clone().requires_grad_()
        y = forward(own_x)
        y.square().mean().backward()
        grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": own_x.grad} | grads)
    assert_same(*found)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_by_the_next_call(name, by_host, calls, read_by_python):
    change, served = CHANGES[name]
    layer = layer_of()
    for _ in range(2):
        assert_pefts(layer)
    assert calls == {"fast": 2, "why": []}
    assert bool(read_by_python) != by_host
    change(layer)
    assert_pefts(layer)
    assert (calls["fast"], len(calls["why"])) == ((3, 0) if served else (2, 1))


def test_what_is_undone_is_served_by_the_host_path_again(calls, read_by_python):
    host_path.ready()
    layer, other = layer_of(), nn.AlphaDropout(0.1).eval()
    dropout, base = layer.lora_dropout["default"], layer.base_layer
    handle = base.register_forward_hook(lambda module, x, y: 2 * y)
    assert_pefts(layer)
    handle.remove()
    layer.lora_dropout["default"] = other
    assert_pefts(layer)
    layer.lora_dropout["default"] = dropout
    layer.merge()
    assert_pefts(layer)
    layer.unmerge()
    layer.enable_adapters(False)
    assert_pefts(layer)
    layer.enable_adapters(True)
    assert (calls["fast"], len(read_by_python)) == (0, 4)
    assert_pefts(layer)
    assert (calls["fast"], len(read_by_python)) == (1, 4)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("name", PARTS)
def test_hooks_on_parts_are_called(name, register, by_host, calls):
    layer, heard = layer_of(), []
    assert_pefts(layer)
    handle = getattr(part(layer, name), register)(lambda *_: heard.append(name))
    layer(X)
    assert heard == [name]
    handle.remove()
    layer(X)
    assert heard == [name]
    assert (calls["fast"], len(calls["why"])) == (2, 1)


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("name", ["base_layer", "lora_A", "lora_B"])
def test_backward_hooks_on_parts_are_called(name, register, by_host):
    layer, heard = layer_of(), []
    assert_pefts(layer)
    getattr(part(layer, name), register)(lambda *_: heard.append(name))
    with torch.no_grad():
        y = layer(X)
    recorded = layer(X.clone().requires_grad_())
    torch.testing.assert_close(recorded, y, rtol=1e-4, atol=1e-5)
    assert heard == []
    recorded.sum().backward()
    assert heard == [name]


def test_hooks_on_the_layer_and_on_all_modules_are_called(by_host, calls):
    layer, heard = layer_of(), []
    y = layer(X)
    layer.register_forward_hook(lambda module, x, y: heard.append("own") or 2 * y)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: heard.append("any") or 3 * y if module is layer else None
    )
    try:
        torch.testing.assert_close(layer(X), 6 * y)
    finally:
        handle.remove()
    assert sorted(heard) == ["any", "own"]
    assert calls == {"fast": 2, "why": []}


def test_training_turns_dropout_on(by_host, calls):
    layer = layer_of()
    y = layer(X)
    layer.train()
    torch.manual_seed(5)
    dropped = layer(X)
    torch.manual_seed(5)
    assert torch.equal(layer(X), dropped)
    assert not torch.allclose(dropped, y)
    part(layer, "lora_dropout").eval()
    assert torch.equal(layer(X), y)
    part(layer, "lora_dropout").training = True
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(layer(X), y)
    assert calls == {"fast": 5, "why": []}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(dtype, by_host, calls):
    layer = layer_of()
    assert_pefts(layer)
    layer.to(dtype)
    y, truth = layer(X.to(dtype)), copy.deepcopy(layer).double()(X.to(dtype).double())
    assert y.dtype == dtype
    theirs = ours.PeftLinear.forward(layer, X.to(dtype))
    eps = torch.finfo(dtype).eps / 8 * truth.square().mean().sqrt()
    error, stock = ((one.double() - truth).square().mean().sqrt() for one in (y, theirs))
    assert error <= 2 * max(stock, eps)
    assert calls == {"fast": 3, "why": []}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_a_layer_of_its_own(copied, by_host, calls):
    layer = layer_of()
    y = layer(X)
    other = copied(layer)
    assert torch.equal(other(X), y)
    other.set_scale("default", 3.0)
    other.base_layer.weight.data.normal_()
    assert_pefts(other)
    assert torch.equal(layer(X), y)
    assert calls == {"fast": 4, "why": []}


def test_a_transposed_base_is_served(by_host, calls, read_by_python):
    model = peft_model(targets=["mixed"], fan_in_fan_out=True).eval()
    lorafast.accelerate(model)
    layer = model.base_model.model.mixed
    assert_pefts(layer)
    layer.base_layer.weight = factor((K, K), requires_grad=False)
    assert_pefts(layer)
    layer.base_layer.weight.requires_grad_(True)
    assert_pefts(layer)
    assert (calls["fast"], len(calls["why"])) == (2, 1)
    assert len(read_by_python) == (1 if by_host else 3)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_call_keeps_no_references(transposed, by_host):
    fields = {"targets": ["mixed"], "fan_in_fan_out": True} if transposed else {"targets": ["up"]}
    model = peft_model(lora_dropout=0.25, lora_bias=not transposed, **fields)
    lorafast.accelerate(model)
    (layer,) = [module for module in model.modules() if isinstance(module, ours.Linear)]
    layer.scaling["default"], layer.lora_dropout["default"].p = float("1.5"), float("0.375")

    def counts():
        values = [*layer.parameters(), layer.scaling["default"], part(layer, "lora_dropout").p]
        return [sys.getrefcount(value) for value in values]

    layer(X)
    before = counts()
    for change in (lambda: None, lambda: layer.base_layer.requires_grad_(True)):
        change()
        for _ in range(5):
            layer(X).sum().backward()
    layer.zero_grad()
    assert counts() == before


def test_wrong_attributes_raise_what_pefts_forward_raises(by_host):
    def outcome(forward):
        with pytest.raises((AttributeError, KeyError)) as told:
            forward(X)
        return str(told.value)

    for spoil in (
        lambda layer: delattr(layer.lora_A["default"], "weight"),
        lambda layer: layer.scaling.clear(),
        lambda layer: layer.lora_B.clear(),
    ):
        layer = layer_of()
        layer(X)
        spoil(layer)
        assert outcome(layer) == outcome(lambda x, layer=layer: ours.PeftLinear.forward(layer, x))

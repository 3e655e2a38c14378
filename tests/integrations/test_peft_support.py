"""Where the ops cannot serve a PEFT layer, PEFT's own forward runs, and the reason is told."""

import numpy
import pytest
import torch
from helpers.peft_models import (
    K,
    N,
    X,
    assert_same,
    config,
    output_and_gradients,
    peft_model,
    perturb,
)
from torch import nn

import lorafast
from lorafast.integrations import peft_calls, peft_support
from lorafast.integrations import peft_linear as ours

pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("few_tokens_by_op")]


def hooked(model):
    model.base_model.model.up.base_layer.register_forward_hook(lambda *_: None)


def hooked_factor(model):
    model.base_model.model.up.lora_B["default"].register_forward_pre_hook(lambda *_: None)


def offloaded(model):
    base = model.base_model.model.up.base_layer
    base.forward = base.forward


def trained(model):
    model.base_model.model.up.base_layer.weight.requires_grad_(True)


def own_base(model):
    class Mine(nn.Linear):
        pass

    model.base_model.model.up.base_layer.__class__ = Mine


def own_factor(model):
    class FSDPLinear(nn.Linear):
        pass

    model.base_model.model.up.lora_A["default"].__class__ = FSDPLinear


def tensor_subclass(model):
    up = model.base_model.model.up.base_layer

    class Quantised(nn.Parameter):
        pass

    up.weight = Quantised(up.weight.detach(), requires_grad=False)


def biased_dora(model):
    up = model.base_model.model.up
    up.lora_variant["default"] = peft_support.DoraLinearVariant()
    up.lora_variant["default"].init(up, "default")
    up.lora_B["default"].bias = nn.Parameter(torch.ones(N))


def own_dropout(model):
    model.base_model.model.up.lora_dropout["default"] = nn.AlphaDropout(0.0)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (hooked, "its base layer has hooks"),
        (hooked_factor, "a part of its adapter has hooks"),
        (offloaded, "its base layer has a forward of its own (offloading?)"),
        (trained, "the weight of its base layer trains"),
        (own_base, "own_base.<locals>.Mine"),
        (own_factor, "own_factor.<locals>.FSDPLinear and a torch.nn.modules.linear.Linear"),
        (tensor_subclass, "tensor_subclass.<locals>.Quantised"),
        (biased_dora, "DoRA with lora_bias, which PEFT counts into the norm"),
        (own_dropout, "its dropout is a torch.nn.modules.dropout.AlphaDropout"),
    ],
)
def test_layers_that_cannot_be_served_step_aside_with_a_reason(spoil, why, calls):
    model = peft_model()
    spoil(model)
    want = output_and_gradients(model, X)
    with pytest.warns(
        UserWarning, match="accelerate: 1 of 2 PEFT layers run on lorafast; left 1: "
    ) as told:
        report = lorafast.accelerate(model)
    assert len(told) == 1
    assert report.taken == ("base_model.model.down",)
    ((name, reason),) = report.left.items()
    assert name == "base_model.model.up"
    assert why in reason
    assert_same(output_and_gradients(model, X), want)
    assert (calls["fast"], calls["why"]) == (1, [reason])
    assert "PEFT's own forward: " in str(lorafast.explain(model))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"lora_dropout": 1e-6}, "its dropout of 1e-06 is nothing or all in 16 bits"),
        (
            {"init_lora_weights": "mica"},
            "its variant is peft.tuners.lora.variants.MiCALinearVariant",
        ),
    ],
    ids=str,
)
def test_a_model_whose_adapters_cannot_be_served_runs_as_before(fields, why, calls):
    model = peft_model(targets=["up"], **fields)
    torch.manual_seed(3)
    want = output_and_gradients(model, X)
    with pytest.warns(UserWarning, match=f"0 of 1 PEFT layers run on lorafast; left 1: {why}"):
        report = lorafast.accelerate(model)
    assert (report.taken, list(report.left)) == ((), ["base_model.model.up"])
    torch.manual_seed(3)
    assert_same(output_and_gradients(model, X), want, 0, 0)
    assert (calls["fast"], calls["why"]) == (0, [report.left["base_model.model.up"]])


def test_a_mixture_with_dora_is_pefts(calls):
    model = peft_model()
    model.add_adapter("other", config(use_dora=True))
    model.base_model.set_adapter(["default", "other"])
    perturb(model)
    want = output_and_gradients(model, X)
    model.base_model.set_adapter(["default"])
    lorafast.accelerate(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same(output_and_gradients(model, X), want)
    assert calls["why"] == ["several active adapters of which one is DoRA"] * 2


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda layer: layer(X.double()), "x and its base layer have different dtypes"),
        (lambda layer: layer(X[..., :-1]), "x does not end in the layer's in_features"),
        (lambda layer: layer(X.long()), "x is no floating activation"),
    ],
)
def test_a_wrong_x_raises_as_pefts_does(call, why, calls):
    model = peft_model()
    layer = model.base_model.model.up
    with pytest.raises(RuntimeError) as want:
        call(layer)
    lorafast.accelerate(model)
    with pytest.raises(RuntimeError) as found:
        call(layer)
    assert str(found.value) == str(want.value)
    assert calls["why"] == [why]


def test_transforms_of_torch_are_pefts(calls):
    model = peft_model(targets=["up"])
    lorafast.accelerate(model)
    layer = model.base_model.model.up
    torch.testing.assert_close(torch.func.vmap(layer)(X), layer(X))
    torch.func.jvp(layer, (X,), (X,))
    assert calls["why"] == ["torch.func or forward-mode AD is at work"] * 2


def with_scaling(number):
    return lambda layer: layer.scaling.update(default=number)


def with_variant(layer):
    layer.lora_variant["default"] = ours.dora.DoraLinearLayer  # no variant at all


def with_own_magnitude(layer):
    class Mine(ours.dora.DoraLinearLayer):
        pass

    layer.lora_magnitude_vector["default"].__class__ = Mine


def with_biased_A(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.zeros(4))


def with_own_factor(layer):
    class Mine(nn.Parameter):
        pass

    B = layer.lora_B["default"]
    B.weight = Mine(B.weight.detach())


def with_factor(part, change):
    def spoil(layer):
        module = getattr(layer, part)["default"]
        module.weight = nn.Parameter(change(module.weight.detach()), requires_grad=False)

    return spoil


def with_bias_on_meta(layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.zeros(N, device="meta"))
    layer.lora_variant.clear()


def with_base(change):
    def spoil(layer):
        layer.base_layer.weight = nn.Parameter(
            change(layer.base_layer.weight.detach()), requires_grad=False
        )

    return spoil


def with_hook_of(part):
    return lambda layer: part(layer).register_full_backward_hook(lambda *_: None)


def double(t):
    return t.double()


def on_meta(t):
    return t.to("meta")


def in_eight_bits(t):
    return t.to(torch.float8_e4m3fn)


ELSEWHERE = "its adapter and its base layer are on different devices"


@pytest.mark.parametrize(
    ("spoil", "x", "why"),
    [
        (lambda layer: layer.enable_adapters(False), X, "the adapters are disabled"),
        (lambda layer: layer.merge(), X, "the adapters are merged"),
        (
            lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
            X,
            "casting of its input is disabled",
        ),
        (lambda layer: setattr(layer, "_active_adapter", ["other"]), X, "no adapter is active"),
        (with_scaling(numpy.float32(2)), X, "its scaling is a numpy.float32"),
        (with_scaling(float("inf")), X, "its scaling is not finite"),
        (
            with_scaling(torch.tensor(2)),
            X,
            "its scaling is no frozen floating tensor of one element on its device",
        ),
        (
            with_scaling(torch.ones(N)),
            X,
            "its scaling is no frozen floating tensor of one element on its device",
        ),
        (
            with_scaling(torch.tensor(2.0, device="meta")),
            X,
            "its scaling is no frozen floating tensor",
        ),
        (
            with_scaling(torch.tensor(2.0, requires_grad=True)),
            X,
            "its scaling is no frozen floating tensor",
        ),
        (with_variant, X, "its variant is builtins.type"),
        (with_own_magnitude, X, "its magnitude is held by a "),
        (with_biased_A, X, "its lora_A has a bias"),
        (with_own_factor, X, "a factor is a "),
        (with_factor("lora_A", in_eight_bits), X, "a factor is torch.float8_e4m3fn"),
        (with_factor("lora_A", on_meta), X, ELSEWHERE),
        (with_factor("lora_magnitude_vector", on_meta), X, ELSEWHERE),
        (with_bias_on_meta, X, ELSEWHERE),
        (with_base(in_eight_bits), X, "the weight of its base layer is torch.float8_e4m3fn"),
        (
            with_base(lambda t: t.to_sparse_csr()),
            X,
            "the weight of its base layer is torch.float32, torch.sparse_csr",
        ),
        (with_base(double), X, "x and its base layer have different dtypes"),
        (with_hook_of(lambda layer: layer.base_layer), X, "its base layer has hooks"),
        (
            with_hook_of(lambda layer: layer.lora_magnitude_vector["default"]),
            X,
            "a part of its adapter has hooks",
        ),
        (
            lambda layer: setattr(layer.base_layer, "_hf_hook", 1),
            X,
            "its base layer has a forward of its own",
        ),
        (lambda layer: None, X.to("meta"), "x and its base layer are on different devices"),
        (lambda layer: None, X.to_sparse(), "x is a torch.Tensor, torch.sparse_coo"),
        (
            lambda layer: None,
            torch.nested.nested_tensor([torch.ones(2, K)]),
            "x is a torch.Tensor, torch.strided",
        ),
        (lambda layer: None, torch.masked.masked_tensor(X, X > 0), "x is a torch.masked"),
        (lambda layer: None, X[0, 0], "x is a single row, which PEFT's DoRA returns as a batch"),
        (lambda layer: None, torch.tensor(1.0), "x is no floating activation"),
    ],
)
def test_every_reason(spoil, x, why):
    model = peft_model(targets=["up"], use_dora=True)
    layer = model.base_model.model.up
    assert peft_support.why_not_call(layer, X, (), {}, "both", "inner") is None
    spoil(layer)
    assert peft_support.why_not_call(layer, x, (), {}, "both", "inner").startswith(why)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((), {"adapter_names": None}, None),
        ((), {"adapter_names": ["default"]}, "is called with adapter_names"),
        ((3,), {"adapter_names": None}, "is called with more than x"),
        ((), {"other": None}, "is called with other"),
    ],
)
def test_what_more_a_call_may_carry(args, kwargs, why):
    layer = peft_model(targets=["up"]).base_model.model.up
    assert peft_support.why_not_call(layer, X, args, kwargs, "both", "inner") == why


def test_autocast_touches_no_fp64():
    layer = peft_model(torch.float64, targets=["up"]).base_model.model.up
    with torch.autocast("cpu", torch.bfloat16):
        assert peft_support.why_not_call(layer, X.double(), (), {}, "both", "inner") is None
        assert (
            peft_support.why_not_call(layer, X, (), {}, "both", "inner")
            == "x and its base layer have different dtypes"
        )


def test_a_layer_somebody_else_took_over_is_left(calls):
    model = peft_model()
    up = model.base_model.model.up
    up.forward = up.forward
    with pytest.warns(UserWarning, match="has a forward of its own, which somebody else put there"):
        report = lorafast.accelerate(model)
    assert report.taken == ("base_model.model.down",)
    assert "PEFT's own forward: a forward of its own" in str(lorafast.explain(model))


def test_explain_tells_what_runs_now():
    model = peft_model(targets=["up"])
    lorafast.accelerate(model)
    model.base_model.disable_adapter_layers()
    assert "PEFT's own forward: the adapters are disabled" in str(lorafast.explain(model))
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    (row,) = lorafast.explain(model).rows
    assert (row.saved, row.backends) == (0, {})
    model.unmerge_adapter()
    model.base_model.model.up._active_adapter = []
    assert "PEFT's own forward: no adapter is active" in str(lorafast.explain(model))


def test_dropout_listens_to_whom_peft_listens():
    """LoRA's dropout to its own mode, DoRA's to the layer's too."""
    for dora, drops in ((False, True), (True, False)):
        layer = peft_model(targets=["up"], use_dora=dora, lora_dropout=0.5).base_model.model.up
        layer.training = False
        assert (peft_calls.adapter_factors(layer, "default").dropout > 0) == drops
        layer.training, layer.lora_dropout["default"].training = True, False
        assert peft_calls.adapter_factors(layer, "default").dropout == 0


def test_restore_refuses_what_has_become_another_class_and_leaves_nothing_behind():
    model = peft_model()
    before = [dict(vars(module)) for module in model.modules()]
    lorafast.accelerate(model, keep="recompute")
    up, right = model.base_model.model.up, ours.Linear
    up.__class__ = type("FSDPLinear", (right,), {})
    with pytest.raises(RuntimeError, match=r"base_model\.model\.up has become a .*FSDPLinear"):
        lorafast.restore(model)
    assert type(model.base_model.model.down) is right
    up.__class__ = right
    assert lorafast.restore(model) == 2
    assert [set(vars(module)) for module in model.modules()] == [set(one) for one in before]

"""Autocast: x cast once at the door, the copy saved, gradients back in the leaves' own dtypes."""

import pytest
import torch

import lorafast
from lorafast import testing
from lorafast.testing import FORMS, Case

pytestmark = pytest.mark.usefixtures("few_tokens_by_op")

BY_NAME = {form.name: form for form in FORMS}
M, N, K, R = 12, 10, 14, 3


def leaves(dtype, form="lora"):
    t = testing.make(Case(BY_NAME[form], M, N, K, R, dtype))
    trained = ("x", "lora_A", "lora_B", "magnitude")
    return {
        name: None if v is None else v.detach().requires_grad_(name in trained)
        for name, v in t.items()
        if name != "seed"
    }


def call(t, norm=None):
    return lorafast.linear(
        t["x"],
        t["weight"],
        t["bias"],
        t["lora_A"],
        t["lora_B"],
        magnitude=t["magnitude"],
        norm=norm,
    )


@pytest.mark.parametrize("form", ["lora", "dora"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(form, low, base):
    t = leaves(base, form)
    with torch.autocast("cpu", low):
        y = call(t)
    assert y.dtype == low
    cast = {name: None if v is None else v.detach() for name, v in t.items()}
    cast |= {"x": cast["x"].to(low), "weight": cast["weight"].to(low)}
    trained = [name for name in ("x", "lora_A", "lora_B", "magnitude") if t[name] is not None]
    for name in trained:
        cast[name].requires_grad_()
    norm = (
        None
        if form == "lora"
        else lorafast.functional.row_norm(t["weight"], t["lora_A"], t["lora_B"])
    )
    by_hand = call(cast, norm)
    assert torch.equal(y, by_hand)
    for output in (y, by_hand):
        output.backward(t["dy"].to(low))
    for name in trained:
        assert t[name].grad.dtype == t[name].dtype
        assert torch.equal(t[name].grad, cast[name].grad.to(t[name].dtype))


def test_the_cast_copy_of_x_is_what_is_saved():
    t = leaves(torch.float32)
    constant = [t[name] for name in ("weight", "bias", "lora_A", "lora_B")]
    with torch.autocast("cpu", torch.bfloat16):
        saved = testing.saved(lambda: call(t), {"x": t["x"]}, constant)
    assert saved == testing.Saved(M * K * 2 + M * R * 2, frozenset())


def test_float64_is_left_alone():
    t = leaves(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t)
    assert y.dtype == torch.float64
    assert torch.equal(y, call(t))


def test_nothing_inside_the_op_is_autocast():
    t = leaves(torch.bfloat16, "dora")
    with torch.autocast("cpu", torch.bfloat16):
        norm = lorafast.functional.row_norm(t["weight"], t["lora_A"], t["lora_B"])
    assert norm.dtype == torch.float32
    assert torch.equal(norm, lorafast.functional.row_norm(t["weight"], t["lora_A"], t["lora_B"]))


def test_float64_beside_another_dtype_is_refused_under_autocast_too():
    t = leaves(torch.float64)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"weight \(10, 14\) is torch\.float64"),
    ):
        lorafast.linear(t["x"].float(), t["weight"], t["bias"], t["lora_A"], t["lora_B"])


def test_without_autocast_a_mixed_base_is_refused():
    t = leaves(torch.float32)
    with pytest.raises(
        TypeError, match=r"weight \(10, 14\) is torch\.float32, x \(12, 14\) is torch\.bfloat16"
    ):
        lorafast.linear(t["x"].bfloat16(), t["weight"], t["bias"], t["lora_A"], t["lora_B"])

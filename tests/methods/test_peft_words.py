"""Words that PEFT has, and other spellings, are answered with what lorafast says."""

import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import AdaLoRA, DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast.runtime import name_hints


@pytest.mark.parametrize(
    ("init", "hint"),
    [
        ("pissa", r"say init=lorafast\.PiSSA\(\)"),
        ("PiSSA", r"say init=lorafast\.PiSSA\(\)"),
        ("pissa_niter_16", r"say init=lorafast\.PiSSA\(svd_niter=16\)"),
        ("lora_ga", r"say init=lorafast\.LoRAGA\(lorafast\.estimate_gradients"),
        (True, "say init='kaiming'"),
        (False, r"lorafast\.accelerate\(model\)"),
        ("olora", r"lorafast\.accelerate\(model\)"),
        ("loftq", r"say lorafast\.quantize_base\(model, 'nf4', loftq="),
        ("eva", r"lorafast\.accelerate\(model\)"),
        ("corda", r"lorafast\.accelerate\(model\)"),
        ("orthogonal", r"lorafast\.accelerate\(model\)"),
        (PiSSA, r"say init=PiSSA\(\.\.\.\), an instance"),
        ("nothing", r"LoRAGA\(\.\.\.\)$"),
        (None, r"LoRAGA\(\.\.\.\)$"),
    ],
)
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_inits(method, init, hint):
    with pytest.raises(ValueError, match="must be one of 'kaiming', 'gaussian'.*" + hint):
        method(r=4, init=init)


def test_an_init_that_is_hinted_at_is_one():
    assert LoRA(r=4, init=lorafast.PiSSA(svd_niter=16)).init.svd_niter == 16


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        (LoRA, "lora_alpha", "spelled alpha"),
        (DoRA, "lora_dropout", "spelled dropout"),
        (LaMDA, "use_rslora", "spelled rslora"),
        (LoRA, "use_dora", r"spelled lorafast\.DoRA"),
        (LoRA, "lora_r", "spelled r "),
        (VeRA, "vera_dropout", "spelled dropout"),
        (LoRA, "target_modules", r"target_modules is an argument of lorafast\.adapt"),
        (LoRA, "bias", r"bias is an argument of lorafast\.adapt"),
        (LoRA, "alphas", "LoRA has no argument alphas; did you mean alpha"),
        (LoRA, "drop_out", "did you mean dropout"),
        (AdaLoRA, "zzz", "AdaLoRA has no argument zzz; it has r, target_r, alpha, dropout"),
    ],
)
def test_arguments(method, argument, message):
    with pytest.raises(TypeError, match=rf"{method.__name__}\({argument}=\.\.\.\): .*{message}"):
        method(**{argument: 1})


def test_a_subclass_may_have_arguments_of_its_own():
    @dataclass(frozen=True, repr=False)
    class Noisy(LoRA):
        noise: float = 0.0

    class Named(LoRA):
        def __init__(self, label, **fields):
            super().__init__(**fields)

    assert Noisy(r=4, noise=0.1).noise == 0.1
    assert Named(label="x", r=3).r == 3
    with pytest.raises(TypeError, match="did you mean noise"):
        Noisy(noize=0.1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Lora", "say lorafast.LoRA"),
        ("LORA", "say lorafast.LoRA"),
        ("lora", "say lorafast.LoRA"),
        ("Dora", "say lorafast.DoRA"),
        ("lora_ga", "say lorafast.LoRAGA"),
        ("pissa", "say lorafast.PiSSA"),
        ("Lamda", "say lorafast.LaMDA"),
        ("LoRAPlus", "say lorafast.optim.LoRAPlus"),
        ("lisa", "say lorafast.schedule.LISA"),
        ("get_peft_model", "say lorafast.adapt(model, lorafast.LoRA(...))"),
        ("LoraConfig", "say lorafast.LoRA(...)"),
        ("PeftModel", "say lorafast.adapt(model"),
        ("save_adapters", "say lorafast.save_adapter"),
        ("explan", "say lorafast.explain"),
    ],
)
def test_public_names(name, hint):
    with pytest.raises(AttributeError) as error:
        getattr(lorafast, name)
    message = str(error.value)
    assert message.startswith(f"module 'lorafast' has no attribute {name!r}; ")
    assert hint in message


@pytest.mark.parametrize("name", ["qwertyuiop", "__wrapped__", "_private"])
def test_names_that_are_near_nothing(name):
    with pytest.raises(AttributeError, match=f"has no attribute {name!r}$"):
        getattr(lorafast, name)
    assert not hasattr(lorafast, name)


def test_every_answer_is_a_public_name():
    for module, names in name_hints._BELOW.items():
        public = set(importlib.import_module(f"lorafast.{module}").__all__)
        assert public - set(names) <= set(lorafast.__all__)
        assert set(names) <= public


def test_a_hint_imports_nothing():
    code = (
        "import sys, lorafast\n"
        "assert not hasattr(lorafast, 'Lora')\n"
        "assert 'torch' not in sys.modules\n"
        "assert lorafast.optim.LoRAPlus and lorafast.nn.linear.Linear is lorafast.Linear\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("all_linear", "say target_modules='all-linear'"),
        ("all linear", "say target_modules='all-linear'"),
        ("All_Linear", "say target_modules='all-linear'"),
        (["all-linear"], "say target_modules='all-linear'"),
        (["all_linear"], "say target_modules='all-linear'"),
        ("all-linears", "say target_modules='all-linear'"),
        (["all-liner"], "say target_modules='all-linear'"),
        ("q_proj", r"say target_modules=\['q_proj'\] for every name that ends in it"),
        ("q_porj", "near it: q_proj"),
        (["q_porj"], "near it: q_proj"),
    ],
)
def test_targets(target, hint):
    with pytest.raises(ValueError, match=f"matches no module; .*{hint}"):
        lorafast.adapt(tiny_transformers.llama(), LoRA(r=2), target)


def test_words_that_are_nearly_right():
    with pytest.raises(ValueError, match=r"keep='output_' must be .*; did you mean 'output'\?"):
        DoRA(keep="output_")
    with pytest.raises(ValueError, match=r"bias='lora-only' .*; did you mean 'lora_only'\?"):
        lorafast.adapt(nn.Sequential(nn.Linear(2, 2)), LoRA(r=2), bias="lora-only")

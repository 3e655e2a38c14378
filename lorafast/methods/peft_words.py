"""PEFT's names of arguments and of inits, and how each is asked for here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorafast.runtime.name_hints import nearest

# PEFT's argument names, and the name of each here.
_ARGUMENTS = {
    "init_lora_weights": "init",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "use_dora": "lorafast.DoRA(...)",
    "use_rslora": "rslora",
    "vera_dropout": "dropout",
}
_OF_ADAPT = (
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "target_modules",
    "task_type",
)
_INITS = {
    "true": "say init='kaiming', the default",
    "default": "say init='kaiming', the default",
    "lora": "say init='kaiming', the default",
    "pissa": "say init=lorafast.PiSSA()",
    "loraga": "say init=lorafast.LoRAGA(lorafast.estimate_gradients(model, batches, loss_fn))",
    "loftq": "say lorafast.quantize_base(model, 'nf4', loftq=lorafast.LoRA(r=16)) of a dense model",
}
# Inits of PEFT's that lorafast lacks. False is PEFT's start with B at random too.
_ONLY_IN_PEFT = ("corda", "eva", "false", "mica", "olora", "orthogonal")


def argument_hint(method: str, name: str, names: Iterable[str]) -> str | None:
    """Return what is wrong with an argument that a method lacks.

    Args:
        method: the name of the method's class.
        name: the argument.
        names: the arguments that the method has.
    """
    if name in _ARGUMENTS:
        return f"{method}({name}=...): this is spelled {_ARGUMENTS[name]} in lorafast"
    if name in _OF_ADAPT:
        return f"{method}({name}=...): {name} is an argument of lorafast.adapt"
    names = list(names)
    meant = nearest(name, names)
    hint = f"did you mean {meant}?" if meant else f"it has {', '.join(names)}"
    return f"{method}({name}=...): {method} has no argument {name}; {hint}"


def init_hint(init: object) -> str:
    """Return the end of a message about an init that a method lacks, or "" if PEFT lacks it too."""
    word = str(init).lower().replace("_", "").replace("-", "").replace(" ", "")
    if niter := re.fullmatch(r"pissaniter(\d+)", word):
        return f"; say init=lorafast.PiSSA(svd_niter={niter[1]})"
    if isinstance(init, type):
        return f"; say init={init.__name__}(...), an instance and not the class"
    if word in _INITS:
        return f"; {_INITS[word]}"
    if word in _ONLY_IN_PEFT:
        return "; start the model in PEFT, and run it with lorafast.accelerate(model)"
    return ""

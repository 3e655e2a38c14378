"""The public name that was meant by another one: PEFT's, or another spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# PEFT's public names, and what does the same here.
_PEFT_NAMES = {
    "AdaLoraConfig": "lorafast.AdaLoRA(...)",
    "LoraConfig": "lorafast.LoRA(...)",
    "LoraLayer": "lorafast.Linear",
    "PeftConfig": "lorafast.LoRA(...)",
    "PeftModel": "lorafast.adapt(model, lorafast.LoRA(...)), or lorafast.load_adapter(model, path)",
    "TaskType": 'lorafast.adapt(..., task_type="SEQ_CLS")',
    "all_linear": 'lorafast.adapt(..., target_modules="all-linear")',
    "VeraConfig": "lorafast.VeRA(...)",
    "from_pretrained": "lorafast.load_adapter(model, path)",
    "get_peft_model": "lorafast.adapt(model, lorafast.LoRA(...)), which takes a PEFT config too",
    "get_peft_model_state_dict": "lorafast.adapter_state_dict(model)",
    "inject_adapter_in_model": "lorafast.adapt(model, lorafast.LoRA(...))",
    "print_trainable_parameters": "print(lorafast.trainable_summary(model))",
    "rsLoRA": "lorafast.LoRA(..., rslora=True)",
    "save_pretrained": "lorafast.save_adapter(model, path)",
    "set_peft_model_state_dict": "lorafast.load_adapter(model, path)",
}
# Names of submodules that users may look for in lorafast itself.
_BELOW = {
    "optim": ("GaLore", "LoRAAsOptimizer", "LoRAFA", "LoRAPlus", "LoRAPro"),
    "schedule": ("LISA", "LaMDAFreeze"),
}


def name_hint(name: str, public: Iterable[str]) -> str:
    """Return the end of a message about a name that lorafast lacks, such as "; say lorafast.LoRA".

    Imports nothing, because Python asks for every submodule as an attribute before it imports it.

    Args:
        name: what was asked for.
        public: the public names of lorafast.

    Returns:
        The hint, or "" if no name is near.
    """
    if name.startswith("_"):
        return ""
    answers = {other: f"lorafast.{other}" for other in public}
    answers |= {
        cls: f"lorafast.{module}.{cls}" for module, names in _BELOW.items() for cls in names
    }
    answers |= _PEFT_NAMES
    meant = nearest(name, answers)
    return f"; say {answers[meant]}" if meant else ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that differs in case or punctuation alone, else a similar one, else None."""
    by_letters = {_letters(other): other for other in names}
    letters = _letters(name)
    if letters in by_letters:
        return by_letters[letters]
    similar = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.75)
    return by_letters[similar[0]] if similar else None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()

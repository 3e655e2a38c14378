"""Heads of models: those that a task trains and saves, and those that no file would hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.models import extra_trainables
from lorafast.models.module_names import (
    canonical_name,
    format_names,
    is_pretrained_model,
    unwrap,
)

# PEFT's task types, and the endings of names of modules that PEFT trains and saves for each.
_ENDINGS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}
# The task of a transformers class, by a part of its name.
_TASKS_OF_CLASSES = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
# Parts of names of transformers classes whose heads are made for one data set.
_HEADED_CLASSES = re.compile("Classification|QuestionAnswering|MultipleChoice")
# Attribute that transformers sets on each Parameter that it has read from a checkpoint.
_LOADED = "_is_hf_initialized"


def check_task_type(task_type: Any) -> str | None:
    """Return a task type as a word. ValueError if it is none of PEFT's."""
    task_type = getattr(task_type, "value", task_type)
    if task_type is not None:
        checks.word("task_type", task_type, tuple(_ENDINGS))
    return task_type


def add_heads(model: nn.Module, task_type: str | None, names: Collection[str]) -> Collection[str]:
    """Return names of modules to save, with those of the heads that a task trains.

    As in PEFT these are all modules whose name ends in "classifier" or "score" ("qa_outputs" for
    QUESTION_ANS). A transformers model without such a module has its head beside the base model.
    """
    endings = _ENDINGS.get(task_type or "", ())
    if not endings:
        return names
    inner = unwrap(model)
    modules = [canonical_name(name) for name, _ in inner.named_modules()]
    heads = [name for name in modules if name.endswith(endings)] or _beside_base(inner)
    return [*names, *(name for name in heads if name not in names)]


def require_heads(model: nn.Module, task_type: str | None, names: Collection[str]) -> None:
    """Raise ValueError if a task trains a head, and no module to save is one."""
    if _ENDINGS.get(task_type or "", ()) and not names:
        endings = " or ".join(_ENDINGS[task_type])
        children = format_names(name for name, _ in unwrap(model).named_children())
        raise ValueError(
            f"task_type={task_type!r} trains a head, and {type(unwrap(model)).__name__} has no "
            f"{endings}: name its head in modules_to_save; its children are {children}"
        )


def _beside_base(model: Any) -> list[str]:
    """Return the children with Parameters that a transformers model has beside its base model."""
    children = dict(model.named_children())
    if not is_pretrained_model(model) or children.pop(model.base_model_prefix, None) is None:
        return []
    return [name for name, child in children.items() if any(True for _ in child.parameters())]


def warn_about_unsaved(model: nn.Module) -> None:
    """Warn of modules that are newly initialised, and that no adapter file will hold."""
    inner = unwrap(model)
    names = [
        f"{prefix}{name}"
        for prefix, part in _outermost_transformers(inner)
        for name in _new_modules(part, _saved_in(model, prefix))
    ]
    if not names:
        return
    advice = f"modules_to_save={names}"
    task = next((t for part, t in _TASKS_OF_CLASSES.items() if part in type(inner).__name__), None)
    if task and set(names) <= set(add_heads(inner, task, ())):
        advice = f"task_type={task!r}"
    warnings.warn(
        f"{format_names(names)}: newly initialised (or resized), and held by no adapter file, so "
        f"that the adapter would be loaded onto other weights; adapt(..., {advice}) trains and "
        "saves them",
        stacklevel=3,
    )


def keep_loaded_mark(before: torch.Tensor, after: torch.Tensor) -> None:
    """Mark a tensor that was made from another as loaded if transformers marked that so."""
    if hasattr(before, _LOADED):
        setattr(after, _LOADED, getattr(before, _LOADED))


def _outermost_transformers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the transformers models in a model that are in no other, with the prefix of names."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        prefix = f"{canonical_name(name)}." if name else ""
        if is_pretrained_model(module) and not any(prefix.startswith(other) for other, _ in found):
            found.append((prefix, module))
    return found


def _saved_in(model: nn.Module, prefix: str) -> tuple[str, ...]:
    """Return the prefixes of names, in the part with a prefix, that modules to save have."""
    names = extra_trainables.saved_modules(model)
    return tuple(f"{name.removeprefix(prefix)}." for name in names if name.startswith(prefix))


def _new_modules(model: Any, saved: tuple[str, ...]) -> list[str]:
    """Return the largest modules of a transformers model all of whose Parameters are new.

    Those are new that lack transformers' mark where others have it. None has it in a model that was
    copied or made from a config: then the head of a classifier is new, unless the checkpoint was of
    the same class.

    saved: prefixes of names that are left out.
    """
    parameters = {
        canonical_name(name): getattr(parameter, _LOADED, False)
        for name, parameter in model.named_parameters()
        if ".lora_" not in f".{name}"
    }
    if not any(parameters.values()):
        kind = type(model).__name__
        known = kind in (getattr(model.config, "architectures", None) or ())
        heads = _beside_base(model) if _HEADED_CLASSES.search(kind) and not known else []
        return [name for name in heads if not f"{name}.".startswith(saved)]
    parameters = {name: old for name, old in parameters.items() if not name.startswith(saved)}
    parents = {name: _parents(name) for name in parameters}
    old = {parent for name, loaded in parameters.items() if loaded for parent in parents[name]}
    new = (next((p for p in parents[name] if p not in old), None) for name in parameters)
    return list(dict.fromkeys(name for name in new if name is not None))


def _parents(name: str) -> list[str]:
    """Return the names of the modules that hold a Parameter, the largest first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]

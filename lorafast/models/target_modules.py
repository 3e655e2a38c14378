"""Which modules of a model a plan means, and which of our layers can take a module's place."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from lorafast.models import expressions
from lorafast.models.adapt_spec import ALL_LINEAR, Plan, matching
from lorafast.models.module_names import clean, ends_with, near
from lorafast.nn import embedding, linear
from lorafast.nn.adapter_layer import AdapterLayer

# Where PEFT looks for the head of a sequence classifier, whose logits are no adapter's business.
_CLASSIFIERS = ("score", "classifier")


def places(model: nn.Module, plan: Plan) -> dict[nn.Module, list[str]]:
    """The modules to adapt, each with every name it goes by, or the one error that says why not."""
    modules = list(model.named_modules(remove_duplicate=False))
    _refuse_adapted(modules)
    if isinstance(model, nn.Linear | nn.Embedding):
        maker = "Linear.from_linear" if isinstance(model, nn.Linear) else "Embedding.from_embedding"
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place: lorafast.{maker}(model, adapter)"
        )
    names = select(model, plan)
    for name, module in modules:
        if name in names and (
            why := layer_for(module)[1] or _carried(module) or _bypassed(model, name)
        ):
            raise TypeError(f"target_modules={plan.target_modules!r} matches {name}, which {why}")
    matched = {module for name, module in modules if name in names}
    found: dict[nn.Module, list[str]] = {}
    for name, module in modules:
        if module in matched:
            found.setdefault(module, []).append(name)
    _refuse_unused_patterns(plan, [names[0] for names in found.values()])
    return found


def select(model: nn.Module, plan: Plan) -> set[str]:
    """The names a plan means, whatever module stands there. A plan knows nothing of torch.compile's and other wrappers' parts."""
    raw: dict[str, list[str]] = {}
    for name, _ in model.named_modules(remove_duplicate=False):
        if name and clean(name):
            raw.setdefault(clean(name), []).append(name)
    names = list(raw)
    if isinstance(plan.target_modules, str) and plan.target_modules.lower() == ALL_LINEAR:
        found = set(map(clean, _linears(model, plan.task_type)))
        if not found:
            raise ValueError(
                f"target_modules='all-linear' matches nothing: {type(model).__name__} has no nn.Linear"
            )
    else:
        found = _matches(plan, names)
    kept = {name for name in found - _excluded(found, plan) if _in_layers(name, plan)}
    if not kept:
        raise ValueError(
            f"target_modules={plan.target_modules!r} matches nothing that exclude_modules={plan.exclude_modules!r}, "
            f"modules_to_save={plan.modules_to_save!r} and layers_to_transform={plan.layers_to_transform!r} leave"
        )
    # A wrapper and what it wraps have one clean name; what is inside is what can be replaced.
    return {max(raw[name], key=len) for name in kept}


def layer_for(module: nn.Module) -> tuple[type[AdapterLayer] | None, str | None]:
    """The class of ours that can take this module's place, or why there is none."""
    if isinstance(module, nn.Embedding):
        return embedding.Embedding, embedding.why_not_plain(module)
    if is_conv1d(module):
        whole = type(module).__name__ == "Conv1D" and isinstance(module.weight, nn.Parameter)
        return (
            linear.Conv1D,
            None if whole else f"is a {type(module).__qualname__}, no plain Conv1D",
        )
    return linear.Linear, linear.why_not_plain(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, asked without importing transformers."""
    return any(
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for kind in type(module).__mro__
    )


def owners(model: nn.Module) -> dict[int, dict[nn.Module, str]]:
    """Who holds a parameter of a storage: the modules, each with the name of the parameter there."""
    found: dict[int, dict[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                found.setdefault(storage(parameter), {}).setdefault(module, f"{name}.{key}")
    return found


def storage(tensor: torch.Tensor) -> int:
    """What tells one storage from another while both live."""
    return tensor.untyped_storage()._cdata


def _linears(model: nn.Module, task_type: str | None) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and task_type == "SEQ_CLS":
        head = next(
            (found for name in _CLASSIFIERS if (found := getattr(model, name, None)) is not None),
            None,
        )
    modules = model.named_modules(remove_duplicate=False)
    return {
        name
        for name, one in modules
        if name and (isinstance(one, nn.Linear) or is_conv1d(one)) and one is not head
    }


def _matches(plan: Plan, names: list[str]) -> set[str]:
    targets = plan.target_modules
    if isinstance(targets, str):
        found = set(expressions.first([targets], names, plan.foreign, whole=True))
        if not found:
            raise ValueError(f"target_modules={targets!r} matches no module{near(targets, names)}")
        return found
    found = set()
    missed = None
    for target in targets:
        ours = {name for name in names if ends_with(name, target)}
        missed = missed if ours or missed else target
        found |= ours
    if missed and not (plan.forgiving and found):
        raise ValueError(f"target_modules: {missed!r} matches no module{near(missed, names)}")
    return found


def _excluded(names: set[str], plan: Plan) -> set[str]:
    excluded = plan.exclude_modules or ()
    if isinstance(excluded, str):
        found = set(expressions.first([excluded], names, plan.foreign, whole=True))
    else:
        found = {name for name in names if any(ends_with(name, one) for one in excluded)}
    return found | {
        name for name in names if any(_within(name, saved) for saved in plan.modules_to_save)
    }


def _within(name: str, module: str) -> bool:
    """Whether a module is called this, or is inside one that is."""
    return f".{module}." in f".{name}."


def _in_layers(name: str, plan: Plan) -> bool:
    if (
        plan.layers_to_transform is None
        or isinstance(plan.target_modules, str)
        or name in plan.target_modules
    ):
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in plan.layers_pattern] or [
        r".*?\.[^.]*\.(\d+)\."
    ]
    found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return found is not None and int(found.group(1)) in plan.layers_to_transform


def _refuse_adapted(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, AdapterLayer):
            raise ValueError(
                f"model is adapted already: {name or 'it'} is a lorafast.{type(module).__name__}"
            )
        if any(kind.__module__.startswith("peft.tuners") for kind in type(module).__mro__):
            raise ValueError(
                f"model carries PEFT adapters already: {name or 'it'} is a {type(module).__qualname__}"
            )


def _refuse_unused_patterns(plan: Plan, names: list[str]) -> None:
    for argument in () if plan.forgiving else ("rank_pattern", "alpha_pattern", "adapter_pattern"):
        for key in getattr(plan, argument):
            if not matching({key: 0}, names):
                raise ValueError(f"{argument}: {key!r} matches no adapted layer{near(key, names)}")


def _carried(module: nn.Module) -> str | None:
    """What replacing the module would lose: hooks, a forward somebody put on this one object, more than weight and bias."""
    if any(
        value for kind, value in vars(module).items() if kind.endswith("_hooks")
    ) or "forward" in vars(module):
        return (
            "has hooks or a patched forward (offloading, pruning?) that its replacement would lose"
        )
    if more := [
        name
        for name, _ in [*module.named_parameters(), *module.named_buffers()]
        if name not in ("weight", "bias")
    ]:
        return f"holds {', '.join(more)} besides weight and bias, which its replacement would lose"
    return None


def _bypassed(model: nn.Module, name: str) -> str | None:
    """Whether the owner of the module reads its weight without calling it: an adapter there would be skipped."""
    parent, _, child = name.rpartition(".")
    if isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer) and child in (
        "linear1",
        "linear2",
    ):
        return "nn.TransformerEncoderLayer does not call in eval, but reads its weight"
    return None

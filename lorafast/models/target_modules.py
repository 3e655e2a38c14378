"""The modules that an AdaptSpec selects, and the adapted layer class that can replace each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from lorafast.models import expert_targets, experts_forward, expressions
from lorafast.models.adapt_spec import ALL_LINEAR, AdaptSpec
from lorafast.models.module_names import canonical_name, endings, similar_names
from lorafast.models.replaceable import (
    is_quantised_linear,
    is_read_by_parent,
    why_not_called,
    why_not_replaceable,
)
from lorafast.nn import embedding, linear
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import ExpertParameter, ParameterExperts
from lorafast.nn.quantised_linear import QuantisedLinear, why_not_quantised
from lorafast.quantised import formats
from lorafast.runtime.torch_internals import storage_key

# Attributes where PEFT finds the head of a sequence classifier, which "all-linear" leaves out.
_CLASSIFIER_HEADS = ("score", "classifier")

# Each module to adapt, with all its names in the model.
Targets = dict[nn.Module, list[str]]


def find_targets(model: nn.Module, spec: AdaptSpec) -> Targets:
    """Return the modules to adapt, each with all its names in the model.

    Raises:
        ValueError: the model is adapted already, or a name or pattern matches nothing.
        TypeError: the model is itself a linear or an embedding, or a selected module cannot be
            replaced.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    _refuse_adapted(modules)
    if isinstance(model, nn.Linear | nn.Embedding):
        maker = "Linear.from_linear" if isinstance(model, nn.Linear) else "Embedding.from_embedding"
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place: "
            f"lorafast.{maker}(model, adapter)"
        )
    names = _called_names(model, spec) if spec.target_modules else set()
    for name, module in modules:
        if name not in names:
            continue
        why = why_not_replaceable(model, name, module, layer_class_for(module)[1])
        # A file may hold such adapters, of PEFT for example, where they have no effect either.
        if why := why or (None if spec.untrusted else why_not_called(model, name)):
            if experts_forward.why_not_experts(module) is None:
                why += "; name its weights in target_parameters"
            raise TypeError(f"target_modules={spec.target_modules!r} matches {name}, which {why}")
    selected = {module for name, module in modules if name in names}
    targets: Targets = {}
    for name, module in modules:
        if module in selected:
            targets.setdefault(module, []).append(name)
    targets.update(expert_targets.find_expert_targets(model, spec).items())
    _refuse_unused_patterns(spec, [canonical_name(names[0]) for names in targets.values()])
    if spec.keep_ties:
        _refuse_tied(model, targets)
    return targets


def _called_names(model: nn.Module, spec: AdaptSpec) -> set[str]:
    """Return the names of the modules that a spec's target_modules select for adapters."""
    # Linears that a quantiser made other modules of are refused later, and never passed over.
    names = _quantised_names(model, spec) or select_names(model, spec)
    if not names.difference(uncalled := uncalled_linears(model, spec, names)):
        raise ValueError(
            f"target_modules='all-linear' matches {uncalled[0]} and the like alone, whose weight "
            "is read and which are never called: an adapter there would have no effect"
        )
    return names.difference(uncalled)


def select_names(model: nn.Module, spec: AdaptSpec) -> set[str]:
    """Return the names that a spec selects, whatever the type of the module.

    A spec is matched against canonical names; the result holds the names in the model, with the
    parts that torch.compile and other wrappers add.
    """
    raw_names: dict[str, list[str]] = {}
    for name, _ in model.named_modules(remove_duplicate=False):
        if name and canonical_name(name):
            raw_names.setdefault(canonical_name(name), []).append(name)
    names = list(raw_names)
    if spec.targets_all_linear:
        matches = set(map(canonical_name, _linear_names(model, spec.task_type)))
        if not matches:
            raise ValueError(
                f"target_modules='all-linear' matches nothing: {type(model).__name__} has no "
                "nn.Linear"
            )
    else:
        matches = _match_targets(spec, names)
    selected = {
        name
        for name in matches - _excluded_names(matches, spec)
        if _is_in_transformed_layers(name, spec)
    }
    if not selected:
        raise ValueError(
            f"target_modules={spec.target_modules!r} matches nothing that "
            f"exclude_modules={spec.exclude_modules!r}, modules_to_save={spec.modules_to_save!r} "
            f"and layers_to_transform={spec.layers_to_transform!r} leave"
        )
    # A wrapper and the module in it have one canonical name; the inner module has the longer raw
    # name, and is the one to replace.
    return {max(raw_names[name], key=len) for name in selected}


def uncalled_linears(model: nn.Module, spec: AdaptSpec, names: Iterable[str]) -> list[str]:
    """Return those of the selected names that "all-linear" leaves out: nothing calls them."""
    if spec.untrusted or not spec.targets_all_linear:
        return []
    return sorted(name for name in names if is_read_by_parent(model, name))


def _quantised_names(model: nn.Module, spec: AdaptSpec) -> set[str]:
    """Return the linears that "all-linear" means, and that a quantiser made other modules of."""
    if not spec.targets_all_linear:
        return set()
    names = {
        canonical_name(name): name
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and is_quantised_linear(module)
        and not isinstance(module, nn.Linear)
        and formats.of(module) is None
    }
    return {names[name] for name in names.keys() - _excluded_names(set(names), spec)}


def layer_class_for(module: nn.Module) -> tuple[type[AdapterLayer] | None, str | None]:
    """Return the class of adapted layer for a module, and why it cannot replace it, or None."""
    if isinstance(module, ExpertParameter):
        return ParameterExperts, None
    if formats.of(module) is not None:
        return QuantisedLinear, why_not_quantised(module)
    if isinstance(module, nn.Embedding):
        return embedding.Embedding, embedding.why_not_plain(module)
    if is_conv1d(module):
        plain = type(module).__name__ == "Conv1D" and isinstance(module.weight, nn.Parameter)
        why = None if plain else f"is a {type(module).__qualname__}, no plain Conv1D"
        return linear.Conv1D, why
    return linear.Linear, linear.why_not_plain(module)


def is_conv1d(module: nn.Module) -> bool:
    """True if the module is a transformers Conv1D. Does not import transformers."""
    return any(
        (base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D")
        for base in type(module).__mro__
    )


def parameter_owners(model: nn.Module) -> dict[int, dict[nn.Module, str]]:
    """Return, by storage key, the modules with a Parameter on that storage and its name there."""
    owners: dict[int, dict[nn.Module, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                owners.setdefault(storage_key(parameter), {}).setdefault(module, f"{name}.{key}")
    return owners


def _linear_names(model: nn.Module, task_type: str | None) -> set[str]:
    """Return the names of every linear except the model's output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _CLASSIFIER_HEADS)
        head = next((candidate for candidate in heads if candidate is not None), None)
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and module is not head and _is_linear(module)
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or formats.of(module) is not None


def _match_targets(spec: AdaptSpec, names: list[str]) -> set[str]:
    targets = spec.target_modules
    if isinstance(targets, str):
        full = set(expressions.first_matches([targets], names, spec.untrusted))
        if not full:
            raise ValueError(
                f"target_modules={targets!r} matches no module{_target_hint(targets, names)}"
            )
        return full
    wanted = set(targets)
    found = {name: wanted.intersection(endings(name)) for name in names}
    matches = {name for name, ends in found.items() if ends}
    unused = wanted.difference(*found.values())
    unmatched = next((target for target in targets if target in unused), None)
    if unmatched is not None and not (spec.ignore_unmatched and matches):
        raise ValueError(
            f"target_modules: {unmatched!r} matches no module{_target_hint(unmatched, names)}"
        )
    return matches


def _target_hint(target: str, names: list[str]) -> str:
    """Return the end of a message about a target that matches nothing: what may be meant."""
    words = [part for part in re.split(r"[\W_]", target.lower()) if part]
    if difflib.get_close_matches("-".join(words), [ALL_LINEAR], cutoff=0.8):
        return f"; say target_modules={ALL_LINEAR!r}"
    if any(target in endings(name) for name in names):
        return (
            "; a string is a regular expression for whole names: say "
            f"target_modules=[{target!r}] for every name that ends in it"
        )
    return similar_names(target, names)


def _excluded_names(names: set[str], spec: AdaptSpec) -> set[str]:
    excluded = spec.exclude_modules or ()
    if isinstance(excluded, str):
        matches = set(expressions.first_matches([excluded], names, spec.untrusted))
    else:
        unwanted = set(excluded)
        matches = {name for name in names if not unwanted.isdisjoint(endings(name))}
    return matches | {
        name for name in names if any(_is_inside(name, saved) for saved in spec.modules_to_save)
    }


def _is_inside(name: str, module: str) -> bool:
    """True if `module` is one or several whole parts of the name: the module itself or a parent."""
    return f".{module}." in f".{name}."


def _is_in_transformed_layers(name: str, spec: AdaptSpec) -> bool:
    """True if layers_to_transform, read as PEFT reads it, does not leave the name out."""
    if (
        spec.layers_to_transform is None
        or isinstance(spec.target_modules, str)
        or name in spec.target_modules
    ):
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in spec.layers_pattern] or [
        r".*?\.[^.]*\.(\d+)\."
    ]
    matches = (re.match(pattern, name) for pattern in patterns)
    match = next((match for match in matches if match), None)
    return match is not None and int(match.group(1)) in spec.layers_to_transform


def _refuse_adapted(modules: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, AdapterLayer):
            raise ValueError(
                f"model is adapted already: {name or 'it'} is a lorafast.{type(module).__name__}"
            )
        if any(base.__module__.startswith("peft.tuners") for base in type(module).__mro__):
            raise ValueError(
                f"model carries PEFT adapters already: {name or 'it'} is a "
                f"{type(module).__qualname__}"
            )


def _refuse_tied(model: nn.Module, targets: Targets) -> None:
    """Raise ValueError if a target's weight is another module's too, where ties are to be kept."""
    owners = parameter_owners(model)
    for module in targets:
        weight = formats.held_weight(module)
        holders = {} if weight.is_meta else owners[storage_key(weight)]
        if len(holders) > 1:
            raise ValueError(
                f"ensure_weight_tying=True: {' and '.join(holders.values())} are one tensor, and "
                "lorafast has no tied adapters: use the model in PEFT, and lorafast.accelerate it"
            )


def _refuse_unused_patterns(spec: AdaptSpec, names: list[str]) -> None:
    if spec.ignore_unmatched:
        return
    for argument in ("rank_pattern", "alpha_pattern", "adapter_pattern"):
        unused = expressions.first_unused(list(getattr(spec, argument)), names)
        if unused is not None:
            raise ValueError(
                f"{argument}: {unused!r} matches no adapted layer{similar_names(unused, names)}"
            )

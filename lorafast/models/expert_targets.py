"""The Parameters of experts that an AdaptSpec's target_parameters select."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lorafast.engine import checks
from lorafast.models import experts_forward
from lorafast.models.adapt_spec import AdaptSpec
from lorafast.models.module_names import canonical_name, endings, similar_names
from lorafast.nn.expert_parameter import CONTAINER, ExpertParameter
from lorafast.runtime.torch_internals import is_foreign_subclass

# Each Parameter to adapt, with the names of its adapter in the model.
ExpertTargets = dict[ExpertParameter, list[str]]


def find_expert_targets(model: nn.Module, spec: AdaptSpec) -> ExpertTargets:
    """Return the Parameters of experts to adapt, in the model's order.

    Raises:
        ValueError: a name matches no Parameter.
        TypeError: a name matches a Parameter that cannot have an adapter.
    """
    wanted, found = set(spec.target_parameters), set()
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    targets: ExpertTargets = {}
    known: list[str] = []
    for module, names in names_of.items():
        if _is_in_saved(names[0], spec):
            continue
        for key in module._parameters:
            full_name = f"{canonical_name(names[0])}.{key}".lstrip(".")
            known.append(full_name)
            matches = wanted.intersection(endings(full_name))
            if not matches:
                continue
            found |= matches
            parent = model.get_submodule(names[0].rpartition(".")[0])
            if why := why_not_parameter(module, key) or _why_not_parent(parent):
                raise TypeError(f"target_parameters matches {full_name}, which {why}")
            target = ExpertParameter(module, key).train(module.training)
            targets[target] = [f"{name}.{CONTAINER}.{key}".lstrip(".") for name in names]
    unmatched = sorted(wanted - found)
    if unmatched and not (spec.ignore_unmatched and targets):
        raise ValueError(
            f"target_parameters: {unmatched[0]!r} matches no Parameter"
            f"{similar_names(unmatched[0], known)}"
        )
    return targets


def _is_in_saved(name: str, spec: AdaptSpec) -> bool:
    """True if a module trains as a whole, in or as one of modules_to_save."""
    return any(f".{saved}." in f".{canonical_name(name)}." for saved in spec.modules_to_save)


def _why_not_parent(parent: nn.Module) -> str | None:
    """Return why a module does not call its experts, or None."""
    # Kernels of the hub and of other libraries, which read the weights themselves, stand there;
    # accelerate's hooks stand there too, and call the class's own.
    if "forward" in vars(parent) and "_hf_hook" not in vars(parent):
        return (
            f"a replacement of {type(parent).__name__}'s forward may read without calling the "
            "experts: load the model without kernels of the hub or of other libraries"
        )
    return None


def why_not_parameter(module: nn.Module, key: str) -> str | None:
    """Return why a Parameter of a module cannot have an adapter for each expert, or None."""
    parameter: Any = module._parameters[key]
    if why := experts_forward.why_not_experts(module):
        return f"belongs to a module that {why}"
    projections = (experts_forward.up_name(module), "down_proj")
    if key not in projections:
        return f"is no projection of experts; those are {' and '.join(projections)}"
    if hasattr(parameter, "ds_shape"):
        return "is partitioned by ZeRO-3: adapt the model before that"
    if hasattr(parameter, "full_tensor"):
        return f"is a sharded DTensor {tuple(parameter.shape)}: adapt the model before sharding it"
    if is_foreign_subclass(parameter) or parameter.dtype not in checks.DTYPES:
        return (
            f"is quantised or of a dtype that lorafast does not compute in ({parameter.dtype}): "
            "load the model unquantised"
        )
    if parameter.dim() != 3:
        return f"has the shape {tuple(parameter.shape)}; experts' weights are [E, N, K]"
    return None


def untargeted(names: Iterable[str], targets: Iterable[list[str]]) -> list[str]:
    """Return those names of Parameters that are no target."""
    taken = {canonical_name(name) for own in targets for name in own}
    return [name for name in names if canonical_name(name) not in taken]

"""What an adapter's file holds for a model: everything is checked here, before anything changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.adapted import Adapted
from lorafast.methods.adapter import Adapter, Part
from lorafast.methods.vera import projections
from lorafast.models import besides, files, form, keys, peft_config
from lorafast.models.names import adapted, clean, near, some
from lorafast.models.plan import Plan
from lorafast.models.targets import places

Places = dict[nn.Module, list[str]]

# A file's expressions are matched only if that cannot take forever: no repeated group, and few repetitions.
_REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")
_REPETITION = re.compile(r"(?<!\\)[*+{]")
_REPETITIONS = 4


class Content(NamedTuple):
    """A file's tensors by where they go: values and starts by layer and part, the rest by its name in the model."""

    values: dict[str, dict[str, torch.Tensor]]
    starts: dict[str, dict[str, torch.Tensor] | None]
    rest: dict[str, torch.Tensor]

    def of(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """What Adapted.take wants for a layer."""
        return self.values[name], self.starts[name]


def places_of(model: nn.Module, file: files.AdapterFile, plan: Plan) -> Places:
    """The modules of a plain model that the file's plan means; by the file's keys where its expressions are not to be trusted."""
    expressions = [e for e in (plan.target_modules, plan.exclude_modules) if isinstance(e, str)] + list(plan.layers_pattern)
    if all(map(_tame, expressions)):
        return places(model, plan)
    named = set(keys.sorted_keys(file.entries).layers)
    return places(model, plan, {name for name, _ in model.named_modules(remove_duplicate=False) if clean(name) in named})


def _tame(expression: str) -> bool:
    return not _REPEATED_GROUP.search(expression) and len(_REPETITION.findall(expression)) <= _REPETITIONS


def plan_of(file: files.AdapterFile) -> Plan:
    """What the file asks for; what save_adapter stacked has its own rank and scaling again."""
    for argument in ("rank_pattern", "alpha_pattern"):
        for given in (file.config.get(argument), file.extras.get(argument)):
            if isinstance(given, Mapping) and (wild := [key for key in given if not _tame(key)]):
                raise ValueError(f"{argument}: {wild[0]!r} repeats too much for an expression out of a file")
    try:
        return _plan_of(file)
    except OverflowError as error:
        raise ValueError(f"{files.CONFIG}: a number is too large: {error}") from error


def _plan_of(file: files.AdapterFile) -> Plan:
    # What lorafast wrote names modules to save in full.
    plan = replace(peft_config.plan_of(file.config, loading=True), loose=not file.extras)
    if not file.extras.get("stacked"):
        return replace(plan, adapter=form.overlaid(plan.adapter, file.extras))
    ranks = {"r": plan.adapter.r} | dict(plan.rank_pattern)
    if odd := {key: r for key, r in ranks.items() if r % 2}:
        raise ValueError(f"{files.CONFIG}: {odd} are odd, and cannot be ranks with their starts")
    alpha, pattern = file.extras.get("alpha"), file.extras.get("alpha_pattern")
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{files.WEIGHTS} metadata: alpha_pattern={pattern!r} must be a dict")
    adapter = form.overlaid(replace(plan.adapter, r=plan.adapter.r // 2, alpha=alpha), file.extras)
    if not adapter.residual or form.stacked(adapter).scaling != plan.adapter.scaling:
        raise ValueError(f"{files.CONFIG} says {plan.adapter}, {files.WEIGHTS} was written for {form.stacked(adapter)}")
    return replace(plan, adapter=adapter, rank_pattern={key: r // 2 for key, r in plan.rank_pattern.items()}, alpha_pattern=pattern)


def content_of(
    model: nn.Module, file: files.AdapterFile, plan: Plan, replaced: Places, adapter_dtype: torch.dtype | None
) -> Content:
    """The file's tensors for this model, or the one error that says why they are not for it.

    replaced: the modules that will get an adapter, with their names; empty if the model is adapted already.
    """
    found, stacked = keys.sorted_keys(file.entries), bool(file.extras.get("stacked"))
    present = adapted(model, required=False)
    if present:
        modules: dict[str, nn.Module] = dict(present)
        saved, biases = besides.saved(model), besides.biases(model)
    else:
        modules = {clean(names[0]): module for module, names in replaced.items()}
        saved, biases = besides.selected(model, plan, replaced)
    _refuse_names("layer", found.layers, modules)
    if meta := [name for name, module in modules.items() if module.weight.is_meta]:
        raise ValueError(f"{some(meta)}: the weights are on the meta device: load them before the adapter")
    specs = _specs(plan, file, found, modules)
    for name, layer in present.items():
        layer._refuse_if_sharded("load_adapter()")
        _refuse_other_adapter(name, layer, specs[name])
    for name, module in modules.items():
        _refuse_parts(name, module, form.stacked(specs[name]) if stacked else specs[name], file, found)
    rest = {f"{name}.{key}": tensor for name, module in saved.items() for key, tensor in module.state_dict().items()}
    rest |= {f"{name}.bias": module.bias for name, module in biases.items()}
    _refuse_names("tensor", found.rest, rest)
    for name, key in found.rest.items():
        _refuse_shape(key, file.entries[key].shape, tuple(rest[name].shape))
    tensors = file.tensors()
    _refuse_bases(found, modules, tensors)
    values: dict[str, dict[str, torch.Tensor]] = {}
    starts: dict[str, dict[str, torch.Tensor] | None] = {}
    for name, module in modules.items():
        held = {part: tensors[key] for part, key in found.layers[name].items()} | _cut(specs[name], module, found, tensors)
        now, first = form.unstack(held) if stacked else (held, None)
        dtype = _dtype(module, adapter_dtype)
        values[name] = _finite(name, now, dtype)
        starts[name] = None if first is None else _finite(name, first, dtype)
    return Content(values, starts, {n: _finite(n, {"": tensors[key]}, rest[n].dtype)[""] for n, key in found.rest.items()})


def refuse_other_base(model: nn.Module, config: dict[str, Any]) -> None:
    """An adapter of one base model is none of another, as far as their names tell."""
    theirs, ours = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if isinstance(theirs, str) and isinstance(ours, str) and theirs and ours and _last(theirs) != _last(ours):
        raise ValueError(
            f"base_model_name_or_path: the adapter is for {theirs!r}, the model is {ours!r}; if they fit, check_base=False"
        )


def _last(name: str) -> str:
    """The last part of a hub id or a path; of a path in the hub's cache, that of its id."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", name)
    return (cached.group(1) if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()


def _specs(plan: Plan, file: files.AdapterFile, found: keys.Sorted, modules: dict[str, nn.Module]) -> dict[str, Adapter]:
    """The adapter of every layer, by the file's config."""
    shapes = [_shape(module) for module in modules.values()]
    if found.shared:
        if found.shared.keys() != keys.VERA_SHARED.keys() or any(len(file.entries[k].shape) != 2 for k in found.shared.values()):
            raise ValueError(f"{', '.join(found.shared.values())} must be a pair of matrices")
        shapes.append((file.entries[found.shared["lora_B"]].shape[0], file.entries[found.shared["lora_A"]].shape[-1]))
    return {name: plan.adapter_of(name).fitted(shapes) for name in modules}


def _shape(module: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    shape = tuple(module._W().shape if isinstance(module, Adapted) else module.weight.shape)
    return shape if isinstance(module, Adapted | nn.Linear) else shape[::-1]


def _refuse_names(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - wanted.keys()):
        raise ValueError(f"the file has a {what} {some(unknown)}, which the model or its config has not{near(unknown[0], wanted)}")
    if missing := sorted(wanted.keys() - given.keys()):
        raise ValueError(f"the file lacks the {what} {some(missing)} of the model and its config{near(missing[0], given)}")


def _refuse_shape(key: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise ValueError(f"{key} {given} must be {wanted} for this model and config")


def _refuse_other_adapter(name: str, layer: Adapted, adapter: Adapter) -> None:
    theirs = (type(adapter).__name__, adapter.r, adapter.scaling, adapter.axis, adapter.residual)
    ours = (type(layer.adapter).__name__, layer.r, float(layer.scaling), layer.adapter.axis, layer.adapter.residual)
    if theirs != ours:
        raise ValueError(
            f"{name} has {layer.adapter} with scaling {float(layer.scaling):g}, the file {adapter} with {adapter.scaling:g}"
        )


def _refuse_parts(name: str, module: nn.Module, adapter: Adapter, file: files.AdapterFile, found: keys.Sorted) -> None:
    parts: dict[str, Part] = {part: one for part, one in adapter.parts(*_shape(module)).items() if not one.shared}
    given = found.layers[name]
    if given.keys() != parts.keys():
        extra, lacking = sorted(given.keys() - parts.keys()), sorted(parts.keys() - given.keys())
        told = [f"has {', '.join(given[part] for part in extra)}"] * bool(extra) + [f"lacks {', '.join(lacking)}"] * bool(lacking)
        raise ValueError(f"{name}: the file {' and '.join(told)}, and its config says {adapter}")
    for part, key in given.items():
        _refuse_shape(key, file.entries[key].shape, parts[part].shape)
    N, K = _shape(module)
    for part, key in found.shared.items():
        shape = file.entries[key].shape
        _refuse_shape(key, shape, (adapter.r, max(shape[1], K)) if part == "lora_A" else (max(shape[0], N), adapter.r))


def _refuse_bases(found: keys.Sorted, modules: dict[str, nn.Module], tensors: dict[str, torch.Tensor]) -> None:
    """PEFT saves the table of an adapted embedding too: it must be the model's own."""
    for name, key in found.bases.items():
        if name not in modules:
            raise ValueError(f"the file has {key}, and no adapter for {name}")
        ours, theirs = modules[name].weight, tensors[key]
        if ours.shape != theirs.shape or not torch.equal(theirs.to(ours), ours):
            raise ValueError(
                f"{key} {tuple(theirs.shape)} is another weight than the model's own {tuple(ours.shape)}: put it there first"
            )


def _cut(adapter: Adapter, module: nn.Module, found: keys.Sorted, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's part of what all share: the file's, or drawn again where it holds none."""
    N, K = _shape(module)
    if not any(part.shared for part in adapter.parts(N, K).values()):
        return {}
    if found.shared:
        A, B = tensors[found.shared["lora_A"]], tensors[found.shared["lora_B"]]
    else:
        A, B = projections(adapter.r, *adapter.largest, adapter.projection_prng_key)
    return {"lora_A": A[:, :K], "lora_B": B[:N]}


def _dtype(module: nn.Module, adapter_dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(module, Adapted):
        return module.lora_A.dtype
    half = module.weight.dtype in (torch.bfloat16, torch.float16)
    return adapter_dtype or (torch.float32 if half else module.weight.dtype)


def _finite(name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = {part: tensor.to(dtype) for part, tensor in tensors.items()}
    for part, tensor in found.items():
        if not tensor.isfinite().all():
            where = f"{name}.{part}".removesuffix(".")
            raise ValueError(f"{where} {tuple(tensor.shape)} of the file is not finite in {dtype}")
    return found

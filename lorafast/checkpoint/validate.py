"""What an adapter's file holds for a model: everything is checked here, before anything changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.checkpoint import file_format, files, keys
from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.methods.dora import DoRA
from lorafast.methods.vera import projections
from lorafast.models import adalora_format, extra_trainables, peft_config
from lorafast.models.adapt_spec import Plan
from lorafast.models.module_names import adapted, clean, near, some
from lorafast.models.target_modules import owners, storage
from lorafast.nn.adapter_layer import AdapterLayer, factor_dtype

Places = dict[nn.Module, list[str]]

# What VeRA without its projections in the file may make of a rank: half a gigabyte.
_LARGEST = 1 << 27


class Content(NamedTuple):
    """A file's tensors by where they go: values and starts by layer and part, the rest by its name in the model.

    untie: two of the rest are one tensor in the model and two in the file.
    """

    values: dict[str, dict[str, torch.Tensor]]
    starts: dict[str, dict[str, torch.Tensor] | None]
    rest: dict[str, torch.Tensor]
    untie: bool

    def of(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """What Adapted.take wants for a layer."""
        return self.values[name], self.starts[name]


def plan_of(file: files.AdapterFile) -> Plan:
    """What the file asks for; what save_adapter stacked has its own rank and scaling again."""
    try:
        return _plan_of(file)
    except OverflowError as error:
        raise ValueError(f"{files.CONFIG}: a number is too large: {error}") from error


def _plan_of(file: files.AdapterFile) -> Plan:
    # What lorafast wrote names modules to save in full.
    plan = replace(peft_config.plan_of(file.config, loading=True), loose=not file.extras)
    if not file.extras.get("stacked"):
        return _with_magnitudes(
            replace(plan, adapter=file_format.overlaid(plan.adapter, file.extras)), file
        )
    ranks = {"r": plan.adapter.r} | dict(plan.rank_pattern)
    if odd := {key: r for key, r in ranks.items() if r % 2}:
        raise ValueError(f"{files.CONFIG}: {odd} are odd, and cannot be ranks with their starts")
    alpha, pattern = file.extras.get("alpha"), file.extras.get("alpha_pattern")
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{files.WEIGHTS} metadata: alpha_pattern={pattern!r} must be a dict")
    adapter = file_format.overlaid(
        replace(plan.adapter, r=plan.adapter.r // 2, alpha=alpha), file.extras
    )
    if not adapter.residual or file_format.stacked(adapter).scaling != plan.adapter.scaling:
        raise ValueError(
            f"{files.CONFIG} says {plan.adapter}, {files.WEIGHTS} was written for {file_format.stacked(adapter)}"
        )
    return replace(
        plan,
        adapter=adapter,
        rank_pattern={key: r // 2 for key, r in plan.rank_pattern.items()},
        alpha_pattern=pattern,
    )


def _with_magnitudes(plan: Plan, file: files.AdapterFile) -> Plan:
    """The plan with those layers of the file whose magnitude alone trains."""
    names = file.extras.get("magnitude_only", [])
    layers = keys.sorted_keys(file.entries).layers
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name in layers for name in names
    ):
        raise ValueError(
            f"{files.WEIGHTS} metadata: magnitude_only={str(names)[:200]} must be names of layers in the file"
        )
    if not names:
        return plan
    if not isinstance(plan.adapter, DoRA) or plan.adapter.residual:
        raise ValueError(
            f"{files.WEIGHTS} metadata: magnitude_only={str(names)[:200]} beside {plan.adapter}"
        )
    return replace(
        plan, adapter_pattern={f"^{re.escape(name)}": plan.adapter.alone() for name in names}
    )


def content_of(
    model: nn.Module,
    file: files.AdapterFile,
    plan: Plan,
    replaced: Places,
    adapter_dtype: torch.dtype | None,
) -> Content:
    """The file's tensors for this model, or the one error that says why they are not for it.

    replaced: the modules that will get an adapter, with their names; empty if the model is adapted already.
    """
    found, stacked = keys.sorted_keys(file.entries), bool(file.extras.get("stacked"))
    present = adapted(model, required=False)
    if present:
        modules: dict[str, nn.Module] = dict(present)
        saved, biases = extra_trainables.saved(model), extra_trainables.biases(model)
    else:
        modules = {clean(names[0]): module for module, names in replaced.items()}
        saved, biases = extra_trainables.selected(model, plan, replaced)
    _refuse_names("layer", found.layers, modules)
    if meta := [name for name, module in modules.items() if module.weight.is_meta]:
        raise ValueError(
            f"{some(meta)}: the weights are on the meta device: load them before the adapter"
        )
    specs = _specs(plan, file, found, modules)
    for name, layer in present.items():
        layer._refuse_if_sharded("load_adapter()")
        _refuse_other_adapter(name, layer, specs[name])
    for name, module in modules.items():
        _refuse_parts(
            name, module, file_format.stacked(specs[name]) if stacked else specs[name], file, found
        )
    rest = {
        f"{name}.{key}": tensor
        for name, module in saved.items()
        for key, tensor in module.state_dict().items()
    }
    rest |= {f"{name}.bias": module.bias for name, module in biases.items()}
    found = _with_bases(found, rest, model)
    _refuse_names("tensor", found.rest, rest)
    for name, key in found.rest.items():
        _refuse_shape(key, file.entries[key].shape, tuple(rest[name].shape))
        _refuse_dtype(key, file.entries[key], rest[name].dtype)
    tensors = file.tensors()
    _refuse_bases(found, model, specs if not stacked else {}, tensors)
    untie = _untied(
        {name: tensors[key] for name, key in found.rest.items()}, rest, model, bool(present)
    )
    values: dict[str, dict[str, torch.Tensor]] = {}
    starts: dict[str, dict[str, torch.Tensor] | None] = {}
    for name, module in modules.items():
        held = {part: tensors[key] for part, key in found.layers[name].items()} | _cut(
            specs[name], module, found, tensors
        )
        if isinstance(specs[name], AdaLoRA):
            held = {part: adalora_format.held(part, tensor) for part, tensor in held.items()}
        now, first = file_format.unstack(held) if stacked else (held, None)
        dtype = (
            module.lora_A.dtype
            if isinstance(module, AdapterLayer)
            else factor_dtype(module.weight, adapter_dtype)
        )
        values[name] = _finite(name, now, dtype)
        starts[name] = None if first is None else _finite(name, first, dtype)
    return Content(
        values,
        starts,
        {n: _finite(n, {"": tensors[key]}, rest[n].dtype)[""] for n, key in found.rest.items()},
        untie,
    )


def refuse_other_base(model: nn.Module, config: dict[str, Any]) -> None:
    """An adapter of one base model is none of another, as far as their names tell."""
    theirs, ours = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if (
        isinstance(theirs, str)
        and isinstance(ours, str)
        and theirs
        and ours
        and _last(theirs) != _last(ours)
    ):
        raise ValueError(
            f"base_model_name_or_path: the adapter is for {theirs!r}, the model is {ours!r}; if they fit, check_base=False"
        )


def _last(name: str) -> str:
    """The last part of a hub id or a path; of a path in the hub's cache, that of its id."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", name)
    return (cached.group(1) if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()


def _specs(
    plan: Plan, file: files.AdapterFile, found: keys.Sorted, modules: dict[str, nn.Module]
) -> dict[str, Adapter]:
    """The adapter of every layer, by the file's config."""
    shapes = [_shape(module) for module in modules.values()]
    if found.shared:
        if found.shared.keys() != keys.VERA_SHARED.keys() or any(
            len(file.entries[k].shape) != 2 for k in found.shared.values()
        ):
            raise ValueError(f"{', '.join(found.shared.values())} must be a pair of matrices")
        shapes.append(
            (
                file.entries[found.shared["lora_B"]].shape[0],
                file.entries[found.shared["lora_A"]].shape[-1],
            )
        )
    specs = {name: adapter.bind_model(shapes) for name, adapter in plan.adapters(modules).items()}
    for name, adapter in specs.items():
        largest = getattr(adapter, "largest", None)
        if largest and not found.shared and adapter.r * sum(largest) > _LARGEST:
            raise ValueError(
                f"{name}: r={adapter.r} of {files.CONFIG} is too large to draw projections for {largest} that the file lacks"
            )
    return specs


def _shape(module: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    shape = tuple(module._W().shape if isinstance(module, AdapterLayer) else module.weight.shape)
    return shape if isinstance(module, AdapterLayer | nn.Linear) else shape[::-1]


def _refuse_names(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - wanted.keys()):
        raise ValueError(
            f"the file has a {what} {some(unknown)}, which the model or its config has not{near(unknown[0], wanted)}"
        )
    if missing := sorted(wanted.keys() - given.keys()):
        raise ValueError(
            f"the file lacks the {what} {some(missing)} of the model and its config{near(missing[0], given)}"
        )


def _refuse_shape(key: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise ValueError(f"{key} {given} must be {wanted} for this model and config")


def _refuse_dtype(key: str, entry: files.Entry, wanted: torch.dtype) -> None:
    """Floating dtypes are cast; anything else must be what it is in the model."""
    if entry.dtype != wanted and not (entry.dtype.is_floating_point and wanted.is_floating_point):
        raise ValueError(f"{key} {entry.shape} is {entry.dtype}, and must be {wanted}")


def _refuse_other_adapter(name: str, layer: AdapterLayer, adapter: Adapter) -> None:
    theirs, ours = (
        (type(one).__name__, one.r, one.axis, one.residual, file_format.is_alone(one))
        for one in (adapter, layer.adapter)
    )
    # A scaling goes through alpha = s·r and back, which may round.
    if theirs != ours or not math.isclose(adapter.scaling, float(layer.scaling), rel_tol=1e-12):
        raise ValueError(
            f"{name} has {layer.adapter} with scaling {float(layer.scaling):g}, the file {adapter} with {adapter.scaling:g}"
        )


def _refuse_parts(
    name: str, module: nn.Module, adapter: Adapter, file: files.AdapterFile, found: keys.Sorted
) -> None:
    parts: dict[str, TensorSpec] = {
        part: one for part, one in adapter.tensor_specs(*_shape(module)).items() if not one.shared
    }
    given = found.layers[name]
    if given.keys() != parts.keys():
        extra, lacking = sorted(given.keys() - parts.keys()), sorted(parts.keys() - given.keys())
        told = [f"has {', '.join(given[part] for part in extra)}"] * bool(extra) + [
            f"lacks {', '.join(lacking)}"
        ] * bool(lacking)
        raise ValueError(f"{name}: the file {' and '.join(told)}, and its config says {adapter}")
    for part, key in given.items():
        shape, wanted = file.entries[key].shape, parts[part].shape
        _refuse_shape(
            key,
            shape,
            adalora_format.filed_shape(part, wanted, shape)
            if isinstance(adapter, AdaLoRA)
            else wanted,
        )
        _refuse_dtype(key, file.entries[key], torch.float32)
    N, K = _shape(module)
    for part, key in found.shared.items():
        shape = file.entries[key].shape
        _refuse_dtype(key, file.entries[key], torch.float32)
        _refuse_shape(
            key,
            shape,
            (adapter.r, max(shape[1], K)) if part == "lora_A" else (max(shape[0], N), adapter.r),
        )


def _with_bases(found: keys.Sorted, rest: dict[str, torch.Tensor], model: nn.Module) -> keys.Sorted:
    """PEFT saves a model's embeddings and head too, where it thinks that they may have changed."""
    own = {clean(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    bases = {name: key for name, key in found.rest.items() if name not in rest and name in own}
    return found._replace(
        rest={name: key for name, key in found.rest.items() if name not in bases},
        bases={f"{name}.weight": key for name, key in found.bases.items()} | bases,
    )


def _refuse_bases(
    found: keys.Sorted,
    model: nn.Module,
    specs: dict[str, Adapter],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Base weights in the file must be the model's own; or what a start that changes them will leave of it."""
    own = (
        {
            clean(name): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        if found.bases
        else {}
    )
    for name, key in found.bases.items():
        if name not in own:
            raise ValueError(f"the file has {key}, which the model has not{near(name, own)}")
        adapter = specs.get(name.removesuffix(".weight"))
        if adapter is not None and adapter.residual:
            continue
        ours, theirs = own[name], tensors[key]
        if ours.shape != theirs.shape or not torch.equal(theirs.to(ours), ours):
            raise ValueError(
                f"{key} {tuple(theirs.shape)} is another weight than the model's own {tuple(ours.shape)}: put it there first"
            )


def _untied(
    given: dict[str, torch.Tensor], rest: dict[str, torch.Tensor], model: nn.Module, present: bool
) -> bool:
    """Whether what is one tensor in the model is two in the file, or one that trains and one that does not."""
    held = owners(model) if rest else {}
    first: dict[int, str] = {}
    count: dict[int, int] = {}
    for name, tensor in rest.items():
        place = storage(tensor)
        count[place] = count.get(place, 0) + 1
        other = first.setdefault(place, name)
        if not torch.equal(given[name], given[other]):
            if present:
                raise ValueError(
                    f"{name} and {other} are one tensor {tuple(tensor.shape)} in the model, and two in the file"
                )
            return True
    return not present and any(len(held.get(place, ())) > n for place, n in count.items())


def _cut(
    adapter: Adapter, module: nn.Module, found: keys.Sorted, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A layer's part of what all share: the file's, or drawn again where it holds none."""
    N, K = _shape(module)
    if not any(part.shared for part in adapter.tensor_specs(N, K).values()):
        return {}
    if found.shared:
        A, B = tensors[found.shared["lora_A"]], tensors[found.shared["lora_B"]]
    else:
        A, B = projections(adapter.r, *adapter.largest, adapter.projection_prng_key)
    return {"lora_A": A[:, :K], "lora_B": B[:N]}


def _finite(
    name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    found = {part: tensor.to(dtype) for part, tensor in tensors.items()}
    for part, tensor in found.items():
        if not tensor.isfinite().all():
            where = f"{name}.{part}".removesuffix(".")
            raise ValueError(f"{where} {tuple(tensor.shape)} of the file is not finite in {dtype}")
    return found

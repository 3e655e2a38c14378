"""The tensors of an adapter file, checked against a model before anything in it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.checkpoint import base_weights, expert_files, file_format, files, keys
from lorafast.checkpoint.keys import KeyGroups
from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter
from lorafast.methods.vera import projections
from lorafast.models import adalora_format, extra_trainables
from lorafast.models.adapt import weight_shape
from lorafast.models.adapt_spec import AdaptSpec
from lorafast.models.module_names import (
    adapter_layers,
    canonical_name,
    format_names,
    similar_names,
)
from lorafast.models.target_modules import Targets, parameter_owners
from lorafast.nn.adapter_layer import AdapterLayer, factor_dtype
from lorafast.nn.quantised_linear import QuantisedLinear
from lorafast.quantised import formats
from lorafast.runtime.torch_internals import storage_key

Tensors = dict[str, torch.Tensor]

# Elements of VeRA's projections that are drawn if the file lacks them: half a gigabyte in fp32.
_MAX_DRAWN = 1 << 27


class CheckedTensors(NamedTuple):
    """A file's tensors by where they go.

    values: {layer name: {Parameter name: trained value}}. initial: {layer name: what the init took
    out of the weight, or None}. extra: {tensor name in the model: value} of modules to save and
    biases. bases: {tensor name: value} of base weights that replace the model's. untie: two tensors
    of extra are one tensor in the model and differ in the file.
    """

    values: dict[str, Tensors]
    initial: dict[str, Tensors | None]
    extra: Tensors
    bases: Tensors
    untie: bool

    def of_layer(self, name: str) -> tuple[Tensors, Tensors | None]:
        """Return the values and the init of a layer, the arguments of AdapterLayer.take."""
        return self.values[name], self.initial[name]


def check_tensors(
    model: nn.Module,
    file: files.AdapterFile,
    spec: AdaptSpec,
    targets: Targets,
    adapter_dtype: torch.dtype | None,
) -> CheckedTensors:
    """Return the file's tensors for this model.

    Args:
        model: adapted, or plain.
        file: the open file.
        spec: what the file asks for.
        targets: the modules that will get an adapter; empty if the model is adapted already.
        adapter_dtype: dtype of the factors of new layers, as in adapt.

    Raises:
        ValueError: the file does not fit the model. Names the first layer or tensor that does not.
        NotImplementedError: an adapted layer is sharded.
    """
    stacked = bool(file.extras.get("stacked"))
    groups = keys.group_keys(file.entries)
    present = adapter_layers(model, required=False)
    modules, extra = _model_parts(model, spec, targets)
    groups = groups._replace(layers=expert_files.renamed(groups.layers, modules))
    _refuse_names("layer", groups.layers, modules)
    if meta := [name for name, module in modules.items() if formats.held_weight(module).is_meta]:
        raise ValueError(
            f"{format_names(meta)}: the weights are on the meta device: load them before the "
            "adapter"
        )
    adapters = _layer_adapters(spec, file, groups, modules)
    for name, layer in present.items():
        layer._refuse_if_sharded("load_adapter()")
        _refuse_other_adapter(name, layer, adapters[name])
    for name, module in modules.items():
        adapter = file_format.stacked_adapter(adapters[name]) if stacked else adapters[name]
        _check_layer(name, module, adapter, file, groups)
        _check_shared(module, adapter, file, groups)
    groups = base_weights.separate(groups, extra, model)
    _check_extra(file, groups, extra)
    tensors = file.tensors()
    bases = base_weights.check(groups, model, {} if stacked else adapters, tensors)
    given = {name: tensors[key] for name, key in groups.extra.items()}
    untie = _must_untie(given, extra, model, bool(present))
    values: dict[str, Tensors] = {}
    initial: dict[str, Tensors | None] = {}
    for name, module in modules.items():
        adapter = file_format.stacked_adapter(adapters[name]) if stacked else adapters[name]
        layer_tensors = _layer_tensors(name, module, adapter, groups, tensors)
        dtype = _layer_dtype(module, adapter_dtype)
        if stacked:
            layer_tensors, layer_initial = file_format.unstack_tensors(layer_tensors)
            initial[name] = _cast(name, layer_initial, dtype)
        else:
            initial[name] = None
        values[name] = _cast(name, layer_tensors, dtype)
    cast_extra = {
        name: _cast(name, {"": tensor}, extra[name].dtype)[""] for name, tensor in given.items()
    }
    return CheckedTensors(values, initial, cast_extra, bases, untie)


def _model_parts(
    model: nn.Module, spec: AdaptSpec, targets: Targets
) -> tuple[dict[str, nn.Module], Tensors]:
    """Return the (future) adapted layers by name, and the extra tensors that train, by name."""
    present = adapter_layers(model, required=False)
    if present:
        modules: dict[str, nn.Module] = dict(present)
        saved = extra_trainables.saved_modules(model)
        biases = extra_trainables.trained_biases(model)
    else:
        modules = {canonical_name(names[0]): module for module, names in targets.items()}
        saved, biases = extra_trainables.select(model, spec, targets)
    extra = {
        f"{name}.{key}": tensor
        for name, module in saved.items()
        for key, tensor in module.state_dict().items()
    }
    extra |= {f"{name}.bias": module.bias for name, module in biases.items()}
    return modules, extra


def _layer_adapters(
    spec: AdaptSpec, file: files.AdapterFile, groups: KeyGroups, modules: dict[str, nn.Module]
) -> dict[str, Adapter]:
    """Return the adapter of every layer, by the file's config."""
    shapes = [_weight_shape(module) for module in modules.values()]
    if groups.shared:
        shared = {name: file.entries[key].shape for name, key in groups.shared.items()}
        if shared.keys() != keys.VERA_SHARED.keys() or any(len(s) != 2 for s in shared.values()):
            raise ValueError(f"{', '.join(groups.shared.values())} must be a pair of matrices")
        # Projections of a larger model also fit this one.
        shapes.append((shared["lora_B"][0], shared["lora_A"][-1]))
    adapters = {
        name: adapter.bind_model(shapes) for name, adapter in spec.adapters(modules).items()
    }
    for name, adapter in adapters.items():
        largest = getattr(adapter, "largest", None)
        if largest and not groups.shared and adapter.r * sum(largest) > _MAX_DRAWN:
            raise ValueError(
                f"{name}: r={adapter.r} of {files.CONFIG} is too large to draw projections for "
                f"{largest} that the file lacks"
            )
    return adapters


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return (N, K). Conv1D and nn.Embedding hold their weight transposed."""
    if isinstance(module, QuantisedLinear):
        return module.quantised.shape
    if isinstance(module, AdapterLayer):
        return tuple(module._W().shape[-2:])
    return weight_shape(module)


def _layer_dtype(module: nn.Module, adapter_dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(module, AdapterLayer):
        return module.lora_A.dtype
    quantised = formats.of(module)
    return factor_dtype(quantised.dtype if quantised else module.weight.dtype, adapter_dtype)


def _refuse_names(kind: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - expected.keys()):
        raise ValueError(
            f"the file has a {kind} {format_names(unknown)}, which the model or its config has "
            f"not{similar_names(unknown[0], expected)}"
        )
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(
            f"the file lacks the {kind} {format_names(missing)} of the model and its config"
            f"{similar_names(missing[0], given)}"
        )


def _refuse_shape(key: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if given != expected:
        raise ValueError(f"{key} {given} must be {expected} for this model and config")


def _refuse_dtype(key: str, entry: files.Entry, expected: torch.dtype) -> None:
    """Raise ValueError if the dtypes differ. Floating dtypes are cast to one another."""
    castable = entry.dtype.is_floating_point and expected.is_floating_point
    if entry.dtype != expected and not castable:
        raise ValueError(f"{key} {entry.shape} is {entry.dtype}, and must be {expected}")


def _refuse_other_adapter(name: str, layer: AdapterLayer, adapter: Adapter) -> None:
    """Raise ValueError if the file's adapter is not the layer's."""
    file_kind, layer_kind = (
        (type(a).__name__, a.r, a.axis, a.residual, file_format.is_magnitude_only(a))
        for a in (adapter, layer.adapter)
    )
    # A file stores alpha = s·r, from which s is computed again; both may round.
    same_scaling = math.isclose(adapter.scaling, float(layer.scaling), rel_tol=1e-12)
    if file_kind != layer_kind or not same_scaling:
        raise ValueError(
            f"{name} has {layer.adapter} with scaling {float(layer.scaling):g}, the file {adapter} "
            f"with {adapter.scaling:g}"
        )


def _check_layer(
    name: str, module: nn.Module, adapter: Adapter, file: files.AdapterFile, groups: KeyGroups
) -> None:
    """Check the names, shapes and dtypes of a layer's own tensors. adapter: as the file has it."""
    specs = {
        part: spec
        for part, spec in expert_files.specs_of(module, adapter, _weight_shape(module)).items()
        if not spec.shared
    }
    given = groups.layers[name]
    if given.keys() != specs.keys():
        extra, missing = sorted(given.keys() - specs.keys()), sorted(specs.keys() - given.keys())
        faults = []
        if extra:
            faults.append(f"has {', '.join(given[part] for part in extra)}")
        if missing:
            faults.append(f"lacks {', '.join(missing)}")
        raise ValueError(f"{name}: the file {' and '.join(faults)}, and its config says {adapter}")
    for part, key in given.items():
        shape, expected = file.entries[key].shape, specs[part].shape
        if isinstance(adapter, AdaLoRA):
            expected = adalora_format.file_shape(part, expected, shape)
        else:
            expected = expert_files.file_shape(part, expected)
        _refuse_shape(key, shape, expected)
        _refuse_dtype(key, file.entries[key], torch.float32)


def _check_shared(
    module: nn.Module, adapter: Adapter, file: files.AdapterFile, groups: KeyGroups
) -> None:
    """Check that VeRA's projections are large enough for a layer."""
    N, K = _weight_shape(module)
    for part, key in groups.shared.items():
        shape = file.entries[key].shape
        _refuse_dtype(key, file.entries[key], torch.float32)
        if part == "lora_A":
            expected = (adapter.r, max(shape[1], K))
        else:
            expected = (max(shape[0], N), adapter.r)
        _refuse_shape(key, shape, expected)


def _check_extra(file: files.AdapterFile, groups: KeyGroups, extra: Tensors) -> None:
    """Check the names, shapes and dtypes of modules to save and biases."""
    _refuse_names("tensor", groups.extra, extra)
    for name, key in groups.extra.items():
        _refuse_shape(key, file.entries[key].shape, tuple(extra[name].shape))
        _refuse_dtype(key, file.entries[key], extra[name].dtype)


def _must_untie(given: Tensors, extra: Tensors, model: nn.Module, adapted: bool) -> bool:
    """True if tensors that are one in the model must become several.

    That is so where they differ in the file, or where only one of them trains. ValueError if the
    model is adapted already, and its tensors stay as they are.
    """
    owners = parameter_owners(model) if extra else {}
    first_names: dict[int, str] = {}
    counts: dict[int, int] = {}
    for name, tensor in extra.items():
        key = storage_key(tensor)
        counts[key] = counts.get(key, 0) + 1
        other = first_names.setdefault(key, name)
        if not torch.equal(given[name], given[other]):
            if adapted:
                raise ValueError(
                    f"{name} and {other} are one tensor {tuple(tensor.shape)} in the model, and "
                    "two in the file"
                )
            return True
    return not adapted and any(len(owners.get(key, ())) > n for key, n in counts.items())


def _layer_tensors(
    name: str, module: nn.Module, adapter: Adapter, groups: KeyGroups, tensors: Tensors
) -> Tensors:
    """Return a layer's tensors by Parameter name, its slices of shared ones included."""
    values = {part: tensors[key] for part, key in groups.layers[name].items()}
    values |= _shared_slices(module, adapter, groups, tensors)
    if isinstance(adapter, AdaLoRA):
        return {part: adalora_format.from_file(part, tensor) for part, tensor in values.items()}
    specs = expert_files.specs_of(module, adapter, _weight_shape(module))
    return {
        part: expert_files.from_file(part, tensor, specs[part]) for part, tensor in values.items()
    }


def _shared_slices(
    module: nn.Module, adapter: Adapter, groups: KeyGroups, tensors: Tensors
) -> Tensors:
    """Return a layer's slices of VeRA's projections; those are drawn again if the file has none."""
    N, K = _weight_shape(module)
    if not any(spec.shared for spec in adapter.tensor_specs(N, K).values()):
        return {}
    if groups.shared:
        A, B = tensors[groups.shared["lora_A"]], tensors[groups.shared["lora_B"]]
    else:
        A, B = projections(adapter.r, *adapter.largest, adapter.projection_prng_key)
    return {"lora_A": A[:, :K], "lora_B": B[:N]}


def _cast(name: str, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the tensors in this dtype. ValueError if one is not finite in it."""
    cast = {part: tensor.to(dtype) for part, tensor in tensors.items()}
    for part, tensor in cast.items():
        if not tensor.isfinite().all():
            full_name = f"{name}.{part}".removesuffix(".")
            raise ValueError(
                f"{full_name} {tuple(tensor.shape)} of the file is not finite in {dtype}"
            )
    return cast

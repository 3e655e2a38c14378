"""lorafast.save_adapter and lorafast.load_adapter: adapters alone, in PEFT's file format."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lorafast.checkpoint import export_lora, file_format, files, keys
from lorafast.checkpoint.file_spec import refuse_other_base, spec_of_file
from lorafast.checkpoint.tensor_values import TensorValues
from lorafast.checkpoint.validate import CheckedTensors, check_tensors
from lorafast.models import adapt_record, file_weights, fused_experts
from lorafast.models.adapt import install, refuse_parallel, set_trainable
from lorafast.models.module_names import (
    adapter_layers,
    canonical_name,
    format_names,
    is_pretrained_model,
    names_by_layer,
    unwrap,
)
from lorafast.models.target_modules import find_targets
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import ParameterExperts


def save_adapter(
    model: nn.Module, path: str | os.PathLike, as_lora: bool = False, rank: int | None = None
) -> None:
    """Write the model's adapter, modules to save and trained biases into a folder, as PEFT does.

    The folder gets adapter_model.safetensors and adapter_config.json. PEFT loads LoRA, rsLoRA,
    DoRA, PiSSA, LoRA-GA, VeRA and AdaLoRA from it and refuses methods that it lacks (LaMDA, AFLoRA,
    DoRA with axis="in"). The file fits the original base weights: where an init changed them,
    s (B A - B₀ A₀) is written as one adapter of twice the rank, which load_adapter splits again.

    The save is atomic: if it is interrupted, the folder holds the old adapter or the new one. In a
    process group every rank must call; rank 0 writes.

    Args:
        model: a model that lorafast.adapt adapted.
        path: folder, created if need be.
        as_lora: write plain LoRA whatever the method, for engines that read nothing else. Exact for
            a low-rank change; otherwise (DoRA, or a smaller rank) the best approximation of that
            rank, whose error is printed.
        rank: rank of the plain LoRA; None keeps the exact one. Only with as_lora=True.

    Raises:
        ValueError: the model has no adapted layer, the layers' adapters cannot share a file, or
            rank is wrong or needed.
        RuntimeError: the adapters are disabled or, with as_lora, merged, or what an init took out
            of a weight is not known.
        NotADirectoryError: path is a file.

    Example:
        import tempfile, torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.DoRA(r=2))
        with tempfile.TemporaryDirectory() as folder:
            lorafast.save_adapter(model, folder)
            lorafast.load_adapter(torch.nn.Sequential(torch.nn.Linear(8, 8)), folder)
    """
    if rank is not None and not as_lora:
        raise ValueError(
            f"rank={rank!r} belongs to as_lora=True; a file otherwise keeps the adapter's own"
        )
    layers = adapter_layers(model, require_enabled=True)
    adapt_record.warn_about_lost(model)
    export = None
    if as_lora:
        export = export_lora.as_lora(model, layers, rank)
        content = FileContent(export.tensors, export.config, {})
    else:
        content = file_content(model)
    warn_about_peft(unwrap(model), content.config)
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        files.write_adapter(Path(path), *content)
        warn_about_base(unwrap(model), Path(path), content.config)
        if export is not None:
            print(export)


class FileContent(NamedTuple):
    """What an adapter's file holds: the arguments of files.write_adapter."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    extras: dict[str, Any]


def file_content(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> FileContent:
    """Return what save_adapter writes, with values read from the model or a state dict of it."""
    layers = adapter_layers(model, require_enabled=True)
    config, extras = file_format.describe_adapters(unwrap(model), layers)
    tensors = _file_tensors(model, layers, TensorValues(model, state_dict))
    return FileContent(tensors, config, extras)


def warn_about_peft(model: nn.Module, config: Mapping[str, Any], stacklevel: int = 4) -> None:
    """Warn about what PEFT reads differently in the model's file, which has this config.

    stacklevel: as warnings.warn counts it in the functions that this one calls.
    """
    _warn_about_shared_layers(model, stacklevel)
    _warn_about_experts(model, config, stacklevel)


def warn_about_base(
    model: nn.Module, folder: Path, config: Mapping[str, Any], stacklevel: int = 3
) -> None:
    """Warn that from_pretrained cannot read the folder of a transformers model without a base.

    A model that was made from a config has no name, and transformers asks the hub for "None".
    stacklevel: as warnings.warn counts it in this function.
    """
    if is_pretrained_model(model) and config.get("base_model_name_or_path") is None:
        warnings.warn(
            f"base_model_name_or_path is null in {os.fspath(folder / files.CONFIG)!r}, because the "
            "model was made from a config and has no name: from_pretrained(folder) would ask the "
            "hub for 'None'. Load the adapter with lorafast.load_adapter(base, folder); or, before "
            "saving it, set model.name_or_path to the folder or hub name of the base",
            stacklevel=stacklevel,
        )


def _warn_about_shared_layers(model: nn.Module, stacklevel: int) -> None:
    """Warn if a layer has several names: PEFT adapts the first alone when it loads the file."""
    for layer_names in names_by_layer(model).values():
        if len({canonical_name(name) for name in layer_names}) > 1:
            warnings.warn(
                f"{' and '.join(layer_names)} are one layer: PEFT will put the file's adapter on "
                "the first alone",
                stacklevel=stacklevel,
            )
            return


def _warn_about_experts(model: nn.Module, config: Mapping[str, Any], stacklevel: int) -> None:
    """Warn if PEFT, loading the file, may put an adapter on fused experts instead of its layer."""
    layers = adapter_layers(model)
    names = [name for name, layer in layers.items() if not isinstance(layer, ParameterExperts)]
    names = fused_experts.taken_for_experts(model, names)
    if names and config["peft_type"] == "LORA":
        warnings.warn(
            "lorafast.load_adapter reads this file as it is; PEFT may take these layers for fused "
            "experts or routers, which have the same names in its configs, and then gives other "
            f"outputs: {format_names(names)}. For a file that PEFT reads, leave them out with "
            "exclude_modules",
            stacklevel=stacklevel,
        )


def _file_tensors(
    model: nn.Module, layers: dict[str, AdapterLayer], values: TensorValues
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by key, for the original base weights."""
    tensors = keys.state_dict_of(model, values)
    for name, layer in layers.items():
        if layer.adapter.residual:
            initial = residual_init(layer)
            if initial is None:
                raise RuntimeError(
                    f"{name}: its start has not happened yet; load the base weights first"
                )
            trained = values.of_layer(name, keys.own_tensors(layer))
            stacked = file_format.stack_tensors(trained, initial)
            tensors |= keys.layer_tensors(name, layer, stacked)
    return tensors


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    trainable: bool = False,
    *,
    revision: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Load an adapter that save_adapter or PEFT wrote, in place, and return the model.

    A plain model is adapted as the file's config says. A model that is adapted already must have
    the same layers, method, rank and scaling as the file; its adapter gets the file's values. So do
    embeddings and the output head where the file has other base weights of the same sizes, as PEFT
    writes them after the vocabulary grew; lorafast.unload, and a file without them, puts back those
    that the model had. Only safetensors files are read, and everything is checked before the model
    changes.

    Args:
        model: a plain or an adapted model; load before wrapping it in DDP or sharding it.
        path: a folder, or an id on the Hugging Face hub (needs the hub extra).
        trainable: True lets what was loaded train as lorafast.adapt does; False freezes it.
        revision: branch, tag or commit of a hub id.
        adapter_dtype: dtype of the factors of a plain model's new layers, as in lorafast.adapt.
        check_base: refuse an adapter whose config names another base model than
            model.name_or_path. The last parts of the two names are compared.

    Returns:
        The same model object.

    Raises:
        ValueError: the file is malformed, or does not fit the model. Names what is wrong first.
        TypeError: model is no module, a field of the config has a wrong type, or a target cannot
            be adapted.
        FileNotFoundError: path is no folder and no id on the hub, or a file is missing.
        RuntimeError: the model's adapters are merged or disabled, a factor is parametrized, or what
            an init took out of a weight is not known.
        NotImplementedError: the model's weights are sharded.

    Example:
        import tempfile, torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        with tempfile.TemporaryDirectory() as folder:
            lorafast.save_adapter(model, folder)
            lorafast.load_adapter(model, folder, trainable=True)
    """
    inner = unwrap(model)
    present = adapter_layers(inner, required=False, require_enabled=True)
    if not present:
        refuse_parallel(model)
    for layer in present.values():
        layer.refuse_computed_factors(
            "cannot take values through that: remove the parametrization before load_adapter()"
        )
    with files.open_adapter(files.locate(path, revision)) as file:
        if check_base:
            refuse_other_base(inner, file.config)
        spec = spec_of_file(file)
        targets = {} if present else find_targets(inner, spec)
        tensors = check_tensors(inner, file, spec, targets, adapter_dtype)

    def finish() -> None:
        _load_extra(inner, tensors.extra)
        file_weights.load(inner, tensors.bases)
        set_trainable(inner, trainable)

    if present:
        _load_layers(present, tensors)
        finish()
    else:
        install(
            inner,
            replace(spec, untie=tensors.untie),
            targets,
            adapter_dtype,
            lambda name, layer: layer.take(*tensors.of_layer(canonical_name(name))),
            finish,
        )
    return model


def _load_layers(layers: dict[str, AdapterLayer], tensors: CheckedTensors) -> None:
    """Give every layer its values. If one fails, all have their old values again."""
    done: list[tuple[AdapterLayer, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]] = []
    try:
        for name, layer in layers.items():
            old_values = {
                part: value.detach().clone() for part, value in keys.own_tensors(layer).items()
            }
            done.append((layer, old_values, residual_init(layer)))
            layer.take(*tensors.of_layer(name))
    except BaseException:
        for layer, old_values, old_initial in done:
            layer.take(old_values, old_initial)
        raise


@torch.no_grad()
def _load_extra(model: nn.Module, extra: dict[str, torch.Tensor]) -> None:
    """Write the values of modules to save and biases into the model."""
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for name, value in extra.items():
        parent, _, child = name.rpartition(".")
        getattr(modules[parent], child).copy_(value)


def residual_init(layer: AdapterLayer) -> dict[str, torch.Tensor] | None:
    """Return what an init took out of the layer's weight, by Parameter name, or None if nothing.

    B is scaled so that the product with the layer's present scaling is the one that was taken out.
    RuntimeError if that is not known.
    """
    start = layer.start_factors()
    if start is None:
        return None
    factors, options = start
    scaling = float(layer.scaling)
    init_scaling = options.scaling if factors.scale is None else float(factors.scale)
    lora_B = factors.lora_B
    if init_scaling != scaling:
        if not scaling:
            raise ValueError(
                f"scaling {scaling} cannot say what a start with scaling {init_scaling} took out "
                f"of weight {tuple(layer.weight.shape)}"
            )
        lora_B = lora_B * (init_scaling / scaling)
    tensors = {
        "lora_A": factors.lora_A,
        "lora_B": lora_B,
        "lora_core": factors.core,
        "lora_out_scale": factors.out_scale,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}

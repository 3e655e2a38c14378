"""lorafast.save_adapter and lorafast.load_adapter: an adapter alone, in PEFT's format, on a plain or an adapted model."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lorafast.checkpoint import export_lora, file_format, files, keys, validate
from lorafast.models.adapt import install, let_train, refuse_parallel
from lorafast.models.module_names import adapted, clean, unwrapped
from lorafast.models.target_modules import places
from lorafast.nn.adapter_layer import NAMES, AdapterLayer


def save_adapter(
    model: nn.Module, path: str | os.PathLike, as_lora: bool = False, rank: int | None = None
) -> None:
    """Write the adapter, and what trains besides, to path/adapter_model.safetensors and path/adapter_config.json, as PEFT does.

    LoRA, rsLoRA, DoRA, PiSSA, LoRA-GA, VeRA and AdaLoRA load in PEFT; what it lacks (LaMDA, AFLoRA, axis="in") it refuses. The
    file fits the untouched base: where a start changed the weight, s (B A - B₀ A₀) is written as one adapter of twice the rank,
    which load_adapter takes apart again. as_lora=True writes plain LoRA whatever the method, for engines that take nothing else:
    exact for low-rank changes, else (DoRA, or a smaller rank) the best of that rank, its error printed.
    Written aside and renamed: a save that is stopped leaves the old adapter or the new one. In a process group every rank calls
    it, and rank 0 writes. ValueError if the layers' adapters cannot share a file, RuntimeError if a start is not known.
    """
    if rank is not None and not as_lora:
        raise ValueError(
            f"rank={rank!r} belongs to as_lora=True; a file otherwise keeps the adapter's own"
        )
    layers = adapted(model, awake=True)
    _warn_of_shared(unwrapped(model))
    if as_lora:
        exported = export_lora.as_lora(model, layers, rank)
        tensors, config, extras = exported.tensors, exported.config, {}
    else:
        found = file_format.form_of(unwrapped(model), layers)
        tensors, config, extras = _tensors(model, layers), found.config, found.extras
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        files.write(Path(path), tensors, config, extras)
        if as_lora:
            print(exported)


def _warn_of_shared(model: nn.Module) -> None:
    places: dict[AdapterLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdapterLayer):
            places.setdefault(module, []).append(name)
    if shared := next(
        (names for names in places.values() if len({clean(name) for name in names}) > 1), None
    ):
        warnings.warn(
            f"{' and '.join(shared)} are one layer: PEFT will put the file's adapter on the first alone",
            stacklevel=3,
        )


def _tensors(model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, torch.Tensor]:
    tensors = keys.adapter_state_dict(model)
    for name, layer in layers.items():
        if layer.adapter.residual:
            start = started(layer)
            if start is None:
                raise RuntimeError(
                    f"{name}: its start has not happened yet; load the base weights first"
                )
            now = {part: keys.whole(held) for part, held in _parts(layer).items()}
            tensors |= keys.of_layer(name, layer, file_format.stack(now, start))
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
    """Load an adapter folder, of lorafast's or PEFT's, or an id on the Hugging Face hub. Returns the model.

    A plain model is adapted as the file's config says; one adapted already must be so for the same layers, method, rank, alpha.
    trainable=False freezes what was loaded, True lets it train as adapt does. adapter_dtype: of a plain model's new layers.
    check_base: refuse an adapter whose config names another base model (by the last part of its name) than model.name_or_path.
    Only safetensors are read. Method, keys, shapes, dtypes, names and numbers are checked before anything changes: ValueError,
    TypeError or FileNotFoundError say the first thing that is wrong with the folder, RuntimeError that the model's adapters are
    merged, disabled or of an unknown start. Adapt or load before wrapping a model in DDP or sharding it.
    """
    inner = unwrapped(model)
    present = adapted(inner, required=False, awake=True)
    if not present:
        refuse_parallel(model)
    with files.opened(files.located(path, revision)) as file:
        if check_base:
            validate.refuse_other_base(inner, file.config)
        plan = validate.plan_of(file)
        replaced = {} if present else places(inner, plan)
        found = validate.content_of(inner, file, plan, replaced, adapter_dtype)

    def finish() -> None:
        _put_rest(inner, found.rest)
        let_train(inner, trainable)

    if present:
        _take_all(present, found)
        finish()
    else:
        plan = replace(plan, untie=found.untie)
        install(
            inner,
            plan,
            replaced,
            adapter_dtype,
            lambda name, layer: layer.take(*found.of(clean(name))),
            finish,
        )
    return model


def _take_all(layers: dict[str, AdapterLayer], found: validate.Content) -> None:
    """Give every layer its values; if one cannot take them, all have their old ones back."""
    done: list[tuple[AdapterLayer, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]] = []
    try:
        for name, layer in layers.items():
            done.append(
                (
                    layer,
                    {part: held.detach().clone() for part, held in _parts(layer).items()},
                    started(layer),
                )
            )
            layer.take(*found.of(name))
    except BaseException:
        for layer, values, first in done:
            layer.take(values, first)
        raise


@torch.no_grad()
def _put_rest(model: nn.Module, rest: dict[str, torch.Tensor]) -> None:
    for name, tensor in rest.items():
        parent, _, child = name.rpartition(".")
        getattr(_at(model, parent), child).copy_(tensor)


def _at(model: nn.Module, name: str) -> nn.Module:
    return next(module for other, module in model.named_modules() if clean(other) == name)


def _parts(layer: AdapterLayer) -> dict[str, nn.Parameter]:
    return {name: held for name in NAMES if (held := getattr(layer, name)) is not None}


def started(layer: AdapterLayer) -> dict[str, torch.Tensor] | None:
    """The factors a start took out of the weight, by the names of their Parameters, for the scaling the layer has now."""
    if (start := layer.start_factors()) is None:
        return None
    f, now = start.factors, float(layer.scaling)
    then = start.settings.scaling if f.scale is None else float(f.scale)
    if then != now and not now:
        raise ValueError(
            f"scaling {now} cannot say what a start with scaling {then} took out of weight {tuple(layer.weight.shape)}"
        )
    B = f.lora_B if then == now else f.lora_B * (then / now)
    found = {"lora_A": f.lora_A, "lora_B": B, "lora_core": f.core, "lora_out_scale": f.out_scale}
    return {name: tensor for name, tensor in found.items() if tensor is not None}

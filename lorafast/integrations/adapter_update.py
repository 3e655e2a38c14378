"""lorafast.adapter_update: the tensors of an adapter that a serving engine needs, and no others."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorafast.checkpoint import export_lora, files, keys
from lorafast.checkpoint.save_load import FileContent, file_content
from lorafast.models import adapt_record
from lorafast.models.module_names import adapter_layers, canonical_name, unwrap

# What of PEFT's starts takes its delta out of the base weights, by how init_lora_weights begins.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")


def adapter_update(
    model: nn.Module,
    path: str | os.PathLike | None = None,
    as_lora: bool = False,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's keys, for an engine that serves the base weights.

    No base weight is among them: after a step of training an engine takes these few bytes, for the
    original base. They are what save_adapter writes for a model of lorafast.adapt, and what PEFT
    saves for a PeftModel, embeddings of the base left out. With a path they are also written there,
    as adapter_model.safetensors and adapter_config.json. Each write replaces the last one whole: a
    reader sees the old tensors or the new ones. Where the config changes as well, there is none for
    a moment, so that no reader takes the new one for the old.

    In a process group every rank must call; rank 0 writes.

    Args:
        model: a model that lorafast.adapt adapted, a PeftModel, or a model with injected PEFT
            adapters.
        path: folder to write to, created if need be; None writes nothing.
        as_lora: plain LoRA whatever the method, as in save_adapter, for engines that read nothing
            else. Only for models of lorafast.adapt.
        rank: rank of the plain LoRA, as in save_adapter. Only with as_lora=True.
        adapter_name: PEFT's name of the adapter; None is the only one, or the active one.

    Returns:
        {key: tensor}. Tensors are detached and on the device where they are in the model, whose
        memory they share unless something had to be computed or gathered; those of as_lora are new.

    Raises:
        ValueError: the model has no adapter or, of PEFT's, several and not one of them active; an
            option does not apply; or PEFT's start of the adapter has changed the
            base weights, which the engine does not know.
        RuntimeError: the adapters are disabled or, with as_lora, merged.
        NotImplementedError: DeepSpeed has partitioned the adapter.
        NotADirectoryError: path is a file.
        TypeError: model is no module.

    Example:
        import tempfile, torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        with tempfile.TemporaryDirectory() as folder:
            tensors = lorafast.adapter_update(model, folder)  # after each step of training
        assert tensors["base_model.model.0.lora_A.weight"].shape == (2, 8)
    """
    inner = unwrap(model)
    if rank is not None and not as_lora:
        raise ValueError(
            f"rank={rank!r} belongs to as_lora=True; otherwise it is the adapter's own"
        )
    if adapter_layers(inner, required=False):
        if adapter_name is not None:
            raise ValueError(
                f"adapter_name={adapter_name!r} is for PEFT's models: this one has one adapter"
            )
        adapt_record.warn_about_lost(inner)
        content = _own_content(inner, as_lora, rank)
    else:
        if as_lora:
            raise ValueError(
                "as_lora=True is for models that lorafast.adapt adapted, which this one is not"
            )
        content = _peft_content(inner, adapter_name)
    if path is not None and _writes():
        files.write_adapter(Path(path), *content)
    return content.tensors


def _writes() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def _own_content(model: nn.Module, as_lora: bool, rank: int | None) -> FileContent:
    if not as_lora:
        return file_content(model)
    layers = adapter_layers(model, require_enabled=True)
    export = export_lora.as_lora(model, layers, rank)
    return FileContent(export.tensors, export.config, {})


def _peft_content(model: Any, adapter_name: str | None) -> FileContent:
    """Return what PEFT saves of one adapter."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise ValueError(
            f"model {type(model).__name__} has no adapter: give it one with lorafast.adapt or "
            "peft.get_peft_model"
        )
    name = _adapter_name(model, configs, adapter_name)
    config = configs[name]
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} of adapter {name!r} has changed the base weights, and an "
            "engine on the original ones would give other outputs: save it by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    import peft

    found = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Injected adapters have the names that they have in the model.
    prefix = "" if isinstance(model, peft.PeftModel) else keys.PREFIX
    tensors = {}
    for key, tensor in found.items():
        if hasattr(tensor, "ds_id"):
            raise NotImplementedError(f"{key} is partitioned by DeepSpeed's ZeRO-3")
        tensor = tensor.detach()
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        tensors[prefix + canonical_name(key)] = whole
    return FileContent(tensors, _config_content(model, config), {})


def _adapter_name(model: Any, configs: dict[str, Any], asked: str | None) -> str:
    if asked is not None:
        if asked not in configs:
            raise ValueError(f"adapter_name={asked!r} is none of {', '.join(map(repr, configs))}")
        return asked
    if len(configs) == 1:
        return next(iter(configs))
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(map(repr, active))}): choose "
            "one by adapter_name"
        )
    return active[0]


def _config_content(model: Any, config: Any) -> dict[str, Any]:
    """Return the content of the adapter_config.json that PEFT writes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with tempfile.TemporaryDirectory() as folder:
        mapping = None
        if config.task_type is None:
            kind = type(base)
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(folder, auto_mapping_dict=mapping)
        content = json.loads((Path(folder) / files.CONFIG).read_text())
    content["inference_mode"] = True
    content["base_model_name_or_path"] = content.get("base_model_name_or_path") or (
        str(getattr(base, "name_or_path", None) or "") or None
    )
    # PEFT writes sets in an order that changes from process to process, and the config then too.
    sets = [name for name, value in vars(config).items() if isinstance(value, set)]
    return content | {name: sorted(content[name]) for name in sets if content.get(name)}

"""A plain LoRA as a GGUF file, which llama.cpp loads beside a base. Needs the gguf package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from lorafast.checkpoint import keys
from lorafast.checkpoint.export_lora import LoRAExport
from lorafast.models.module_names import format_names
from lorafast.runtime import extras

# llama.cpp's name of each transformers model_type whose linears it takes as they are, but for the
# order of the rows of q and k in _PERMUTED.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
_PERMUTED = ("llama",)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def write(
    export: LoRAExport, path: str | os.PathLike, base: str | os.PathLike, dtype: str = "fp32"
) -> None:
    """Write a plain LoRA to a GGUF file.

    Args:
        export: what portable.plain_lora returned; its scaling is 1.
        path: the file to write.
        base: the folder of the base model, or its config.json: for the names and heads.
        dtype: of the factors, "fp32" or "fp16".

    Raises:
        ModuleNotFoundError: gguf is not installed; the message says how to install it.
        ValueError: llama.cpp has no name for a layer or for the base.
    """
    with extras.required("gguf"):
        import gguf

    config = _base_config(Path(base))
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"the base is a {kind!r}; GGUF files are written for {', '.join(ARCHITECTURES)}"
        )
    arch = ARCHITECTURES[kind]
    number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))
    tensors: dict[str, torch.Tensor] = {}
    unknown = []
    for layer, (A, B) in _factors(export).items():
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            unknown.append(layer)
            continue
        if arch in _PERMUTED:
            B = _permuted(layer, B, config)
        tensors |= {f"{name}.lora_a": A, f"{name}.lora_b": B}
    if unknown:
        raise ValueError(f"llama.cpp has no name for {format_names(unknown)} of a {kind}")
    writer = gguf.GGUFWriter(os.fspath(path), arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp's scaling is alpha over the rank of the tensor: 1.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(export.config["lora_alpha"]))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.to(DTYPES[dtype]).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _base_config(base: Path) -> dict[str, Any]:
    file = base / "config.json" if base.is_dir() else base
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no config of a base model: {error}") from error


def _factors(export: LoRAExport) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of every layer. ValueError for an embedding."""
    groups = keys.group_keys(export.tensors)
    tables = [name for name, parts in groups.layers.items() if "embedding" in parts["lora_A"]]
    if tables:
        raise ValueError(f"no GGUF is written of an embedding's adapter: {format_names(tables)}")
    return {
        name: (export.tensors[parts["lora_A"]], export.tensors[parts["lora_B"]])
        for name, parts in groups.layers.items()
    }


def _permuted(layer: str, B: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Return B with the rows of q and k in the order that llama.cpp's rotation needs.

    transformers pairs the two halves of a head, llama.cpp neighbours, so its converter reorders
    the rows of these weights.
    """
    heads = config["num_attention_heads"]
    if layer.endswith("k_proj"):
        heads = config.get("num_key_value_heads") or heads
    elif not layer.endswith("q_proj"):
        return B
    N, R = B.shape
    return B.view(heads, 2, N // heads // 2, R).transpose(1, 2).reshape(N, R)

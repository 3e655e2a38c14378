"""An adapter's folder as plain LoRA of one rank with s = 1, which every serving engine reads alike.

It is made of the file alone: rank and alpha patterns, rsLoRA, cores and scales go into B, exactly.
DoRA's change has no low rank and depends on the base weight, so it needs the base and gets the best
approximation of a rank, whose error is stated. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch

from lorafast.checkpoint import files, keys
from lorafast.checkpoint.export_lora import LoRAExport, truncate
from lorafast.checkpoint.keys import KeyGroups
from lorafast.engine import checks, formula
from lorafast.engine.precision import divide_or_zero
from lorafast.engine.problem import LayerTensors
from lorafast.methods import svd
from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter
from lorafast.methods.dora import DoRA
from lorafast.methods.vera import VeRA
from lorafast.models import adalora_format, peft_config
from lorafast.models.module_names import format_names

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Fields of a config that a plain LoRA keeps.
_KEPT_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "revision",
    "target_modules",
    "task_type",
)


class BaseWeights:
    """The safetensors files of a base model on this machine, read one tensor at a time."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        index = self.folder / _INDEX
        if index.is_file():
            self._files = dict(json.loads(index.read_text())["weight_map"])
        else:
            with safetensors.safe_open(self.folder / _SINGLE, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), _SINGLE)
        strange = [name for name in self._files.values() if Path(str(name)).name != name]
        if strange:
            raise ValueError(
                f"{_INDEX} names {format_names(strange)}, which are no files beside it"
            )

    def weight(self, layer: str, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the weight [N,K] of a layer in fp32, whatever prefix the file gives its name.

        shape: (N, K), if known; a weight that lies in the file as [K,N] is transposed.
        Raises ValueError if there is no such weight, or not one alone.
        """
        name = f"{layer}.weight"
        found = [key for key in self._files if key == name] or [
            key for key in self._files if key.endswith(f".{name}") or name.endswith(f".{key}")
        ]
        if len(found) != 1:
            raise ValueError(
                f"{self.folder}: {len(found) or 'no'} weights are of {layer}"
                f"{': ' + format_names(found) if found else ''}"
            )
        with safetensors.safe_open(self.folder / self._files[found[0]], framework="pt") as file:
            weight = file.get_tensor(found[0]).float()
        if shape is None or tuple(weight.shape) == shape:
            return weight
        if tuple(weight.shape) == shape[::-1]:
            return weight.t()
        raise ValueError(f"{name} is {tuple(weight.shape)}, the adapter is for {shape}")


@torch.no_grad()
def plain_lora(
    path: str | os.PathLike,
    rank: int | None = None,
    base: str | os.PathLike | None = None,
) -> LoRAExport:
    """Return the adapter in a folder as plain LoRA: one rank, alpha = rank, no pattern.

    Args:
        path: a folder that PEFT or lorafast wrote.
        rank: of the result. None is the largest rank in the file; smaller factors get zeros.
        base: the folder of the base model's safetensors, for DoRA and VeRA.

    Returns:
        Tensors by PEFT's keys in fp32, the config, and the relative error of each layer's change.

    Raises:
        ValueError: the file holds what no plain LoRA can say, or needs the base.
        FileNotFoundError: a folder or a file is missing.

    Example:
        import tempfile, torch, lorafast
        from lorafast.checkpoint.portable import plain_lora

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        lorafast.adapt(model, lorafast.LoRA(r=2, alpha=8, rslora=True))
        with tempfile.TemporaryDirectory() as folder:
            lorafast.save_adapter(model, folder)
            print(plain_lora(folder))  # 1 layers as plain LoRA of rank 2 ...
    """
    if rank is not None:
        checks.whole("rank", rank)
    weights = BaseWeights(base) if base is not None and _has_weights(Path(base)) else None
    with files.open_adapter(files.locate(path)) as file:
        spec = peft_config.spec_from_config(file.config, loading=True)
        groups = keys.group_keys(file.entries)
        _refuse_more(groups)
        if spec.adapter.residual:
            raise ValueError(
                f"{files.CONFIG}: {spec.adapter} changed the base's weights when it started, and "
                "the file does not say how: save it from PEFT with "
                "path_initial_model_for_weight_conversion, or by lorafast.save_adapter"
            )
        tensors, adapters = file.tensors(), spec.adapters(groups.layers)
        found, errors = {}, {}
        for name, parts in groups.layers.items():
            values = {part: tensors[key].float() for part, key in parts.items()}
            if isinstance(adapters[name], VeRA):
                values |= _vera_slices(name, values, groups, tensors, weights)
            A, B, errors[name] = _factors(name, values, adapters[name], rank, weights)
            found[name] = A, B
        config = _config(file.config, found, rank)
        return LoRAExport(_padded(found, groups, config["r"]), config, errors)


def _has_weights(folder: Path) -> bool:
    return (folder / _INDEX).is_file() or (folder / _SINGLE).is_file()


def _refuse_more(groups: KeyGroups) -> None:
    """Raise ValueError if a file holds more than adapters of weights."""
    if not groups.layers:
        raise ValueError("the file holds no adapter of a layer")
    biases = [name for name, parts in groups.layers.items() if "lora_bias" in parts]
    if biases:
        raise ValueError(f"lora_bias of {format_names(biases)}: a plain LoRA has no bias")
    more = sorted((*groups.extra, *groups.bases))
    if more:
        raise ValueError(
            f"the file also holds tensors that are no adapter's, which a plain LoRA cannot say: "
            f"{format_names(more)}. Serve the merged model (lorafast.merge)"
        )


def _vera_slices(
    name: str,
    values: dict[str, torch.Tensor],
    groups: KeyGroups,
    tensors: dict[str, torch.Tensor],
    weights: BaseWeights | None,
) -> dict[str, torch.Tensor]:
    """Return a layer's slices of VeRA's projections, which all layers share."""
    if weights is None:
        raise ValueError(
            f"{name}: the file does not say how wide a VeRA layer is: name the folder of the base "
            "model's weights (--base)"
        )
    if groups.shared.keys() != {"lora_A", "lora_B"}:
        raise ValueError("the file lacks VeRA's projections: save it with save_projection=True")
    N, K = weights.weight(name).shape
    if values["lora_out_scale"].shape[0] not in (N, K):
        raise ValueError(f"{name}: vera_lambda_b is {tuple(values['lora_out_scale'].shape)}")
    if values["lora_out_scale"].shape[0] != N:
        N, K = K, N
    A, B = (tensors[groups.shared[part]].float() for part in ("lora_A", "lora_B"))
    return {"lora_A": A[:, :K], "lora_B": B[:N]}


def _factors(
    name: str,
    values: dict[str, torch.Tensor],
    adapter: Adapter,
    rank: int | None,
    weights: BaseWeights | None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A [r,K], B [N,r] and the relative error of a layer's change ΔW ≈ BA."""
    core = values.get("lora_core")
    if core is not None and isinstance(adapter, AdaLoRA):
        values = {part: adalora_format.from_file(part, value) for part, value in values.items()}
        core = values["lora_core"]
    missing = {"lora_A", "lora_B"} - values.keys()
    if missing:
        raise ValueError(f"{name}: the file lacks {' and '.join(sorted(missing))}")
    A = values["lora_A"]
    parts = LayerTensors(A, None, A, values["lora_B"], core, out_scale=values.get("lora_out_scale"))
    B = formula.effective_B(parts, torch.float32) * adapter.scaling
    if "lora_magnitude" in values:
        return _approximated(name, A, B, values["lora_magnitude"].flatten(), adapter, rank, weights)
    if rank is None or rank >= A.shape[0]:
        return A, B, 0.0
    return truncate(A, B, rank)


def _approximated(
    name: str,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor,
    adapter: Adapter,
    rank: int | None,
    weights: BaseWeights | None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best factors of a DoRA layer's change, of the rank or of the layer's own."""
    if weights is None:
        raise ValueError(
            f"{name}: DoRA's change of a weight depends on the weight, which the file does not "
            f"hold: name a folder with the base model's {_SINGLE} (--base)"
        )
    weight = weights.weight(name, (B.shape[0], A.shape[1]))
    adapted = weight + B @ A
    axis = 1 if not isinstance(adapter, DoRA) or adapter.axis == "out" else 0
    gain = divide_or_zero(magnitude, torch.linalg.vector_norm(adapted, dim=axis))
    delta = (gain[:, None] if axis else gain) * adapted - weight
    U, S, Vh = svd.truncated_svd(delta, min(rank or A.shape[0], *delta.shape))
    total = torch.linalg.matrix_norm(delta)
    error = torch.linalg.matrix_norm(delta - U * S @ Vh)
    return Vh, U * S, float(error / total) if total else 0.0


def _padded(
    found: dict[str, tuple[torch.Tensor, torch.Tensor]], groups: KeyGroups, R: int
) -> dict[str, torch.Tensor]:
    """Return the factors by PEFT's keys, with zeros up to one rank: llama.cpp divides by it."""
    tensors = {}
    for name, (A, B) in found.items():
        r = A.shape[0]
        A = torch.cat([A, A.new_zeros(R - r, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], R - r)], 1)
        embedding = "embedding" in groups.layers[name].get("lora_A", "")
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else _LINEAR_ENDS
        for end, factor in zip(ends, (A, B), strict=True):
            tensors[f"{keys.PREFIX}{name}.{end}"] = factor.contiguous()
    return tensors


_LINEAR_ENDS = ("lora_A.weight", "lora_B.weight")


def _config(
    config: dict[str, Any],
    found: dict[str, tuple[torch.Tensor, torch.Tensor]],
    rank: int | None,
) -> dict[str, Any]:
    R = rank or max(A.shape[0] for A, _ in found.values())
    # No rank that was asked for is larger than what there is.
    R = min(R, max(A.shape[0] for A, _ in found.values()))
    plain = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": R,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "lora_bias": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return plain | {key: config[key] for key in _KEPT_FIELDS if config.get(key) is not None}

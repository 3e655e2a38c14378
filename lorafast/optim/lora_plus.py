"""LoRA+ (arXiv 2402.12354): lora_B learns `ratio` times as fast as lora_A.

    η_A = lr,  η_B = ratio·lr        A [R,K], B [N,R]; B starts at 0, and with one rate for both learns too slowly where K is large
An assignment of learning rates to parameters, as PEFT's create_loraplus_optimizer makes it; the optimizer is any class of torch's.
    lr              lora_A, LaMDA's core [R,R], every other trained matrix (modules_to_save)
    ratio·lr        lora_B and every trained vector: DoRA's magnitude, biases, norms, VeRA's core [R] and out_scale [N]
    lr_embedding    lora_A, lora_B and core of an embedding
"""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar

import torch
from torch import nn

from lorafast.models.module_names import adapted, unwrapped
from lorafast.nn.embedding import Embedding

_OTHER_NAMES = {
    "optimizer_cls": "optimizer_class",
    "loraplus_lr_ratio": "ratio",
    "loraplus_lr_embedding": "lr_embedding",
    "loraplus_weight_decay": "weight_decay",
}


class LoRAPlus:
    """LoRAPlus(model, torch.optim.AdamW, lr=2e-4, ratio=16) is that AdamW, with the model's trained parameters in LoRA+'s groups.

    What comes back is an optimizer_class and nothing else: its state, hooks, fused and foreach forms, schedulers and GradScaler are
    its own. Each group has a "name" ("A", "embedding", "B", "B_no_decay"; empty ones are left out), and its lr may be set there.
    ratio: η_B/η_A, above 0; the paper advises about 16. weight_decay: for all but biases and norms, which have none; 0 by default,
    not optimizer_class's own default. settings: whatever else optimizer_class takes. A PEFT model with LoRA layers will do too.
    ValueError without an adapter or anything that trains, or for a ratio or rate out of range; TypeError for PEFT's argument names.
    """

    paper: ClassVar[str] = "arXiv 2402.12354"
    trains: ClassVar[str] = "what the adapter trains"
    keeps: ClassVar[str] = "what the optimizer class keeps"

    def __new__(
        cls,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        lr: float | torch.Tensor = 2e-4,
        ratio: float = 16,
        *,
        lr_embedding: float | torch.Tensor = 1e-6,
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> torch.optim.Optimizer:
        for name in settings:
            if name in _OTHER_NAMES:
                raise TypeError(
                    f"LoRAPlus({name}=...): this is spelled {_OTHER_NAMES[name]} in lorafast"
                )
        if not (
            isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        ):
            raise TypeError(
                f"optimizer_class must be a torch.optim.Optimizer class, not {optimizer_class!r}"
            )
        if (
            isinstance(ratio, bool)
            or not isinstance(ratio, int | float)
            or not 0 < ratio < math.inf
        ):
            raise ValueError(f"ratio={ratio!r} must be a finite number above 0")
        for name, value in (
            ("lr", lr),
            ("lr_embedding", lr_embedding),
            ("weight_decay", weight_decay),
        ):
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must not be negative")
        rates = {"A": lr, "embedding": lr_embedding, "B": lr * ratio, "B_no_decay": lr * ratio}
        parameters = _kinds(unwrapped(model))
        groups = [
            {
                "params": parameters[kind],
                "lr": rate,
                "weight_decay": 0.0 if kind == "B_no_decay" else weight_decay,
                "name": kind,
            }
            for kind, rate in rates.items()
            if parameters[kind]
        ]
        optimizer = optimizer_class(groups, lr=lr, **settings)
        if optimizer_class.__name__ in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
            _keep_wide(model, optimizer_class)
        return optimizer


def _kinds(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What trains, by the group it belongs to."""
    found: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    kinds: dict[nn.Parameter, str] = {}
    has_adapter = bool(adapted(model, required=False, awake=True))
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                has_adapter = has_adapter or ".lora_" in f".{prefix}."
                kinds.setdefault(parameter, _kind(module, f"{prefix}.{key}", key, parameter))
    if not has_adapter:
        adapted(model)  # raises: there is none
    if not kinds:
        raise ValueError(f"model {type(model).__name__} has no parameter that trains")
    for parameter, kind in kinds.items():
        found[kind].append(parameter)
    return found


def _kind(module: nn.Module, name: str, key: str, parameter: nn.Parameter) -> str:
    ours = isinstance(module, Embedding) and key in ("lora_A", "lora_B", "lora_core")
    if ours or ".lora_embedding_" in name:
        return "embedding"
    if "lora_B" not in name and parameter.dim() != 1:
        return "A"
    return "B_no_decay" if "bias" in key or "Norm" in type(module).__name__ else "B"


def _keep_wide(model: nn.Module, optimizer_class: type) -> None:
    """An embedding's rows are seldom written: in 8 bits their moments would be lost, so bitsandbytes keeps them in 32."""
    manager = importlib.import_module(
        optimizer_class.__module__.split(".")[0]
    ).optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})

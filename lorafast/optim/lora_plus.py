"""LoRA+, low-rank adaptation with a larger learning rate for B (arXiv:2402.12354)."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import nn

from lorafast.methods.adapter import is_finite_number
from lorafast.models.module_names import adapter_layers, unwrap
from lorafast.nn.embedding import Embedding

# PEFT's argument names, and the name of each here.
_PEFT_NAMES = {
    "optimizer_cls": "optimizer_class",
    "loraplus_lr_ratio": "ratio",
    "loraplus_lr_embedding": "lr_embedding",
    "loraplus_weight_decay": "weight_decay",
}
_8BIT_OPTIMIZERS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


class LoRAPlus:
    """LoRA+: any torch optimizer, with a learning rate for lora_B that is `ratio` times lora_A's.

        η_A = lr        η_B = ratio · lr

    B starts at 0, and with one learning rate for both it learns too slowly where K is large. The
    parameters are assigned to groups as by PEFT's create_loraplus_optimizer:

    - group "A", with lr: lora_A, LaMDA's core [R, R], and every other trained matrix;
    - groups "B" and "B_no_decay", with ratio·lr: lora_B and every trained vector, which are DoRA's
      magnitude, biases, norms, a core [R] and an out_scale [N];
    - group "embedding", with lr_embedding: lora_A, lora_B and core of an embedding.

    `LoRAPlus(model, torch.optim.AdamW, lr=2e-4, ratio=16)` is a torch.optim.AdamW and nothing else:
    its state, hooks, fused and foreach forms, schedulers and GradScaler are the class's own. Every
    group has a "name", and empty groups are left out.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LoRA(r=4))
        optimizer = lorafast.optim.LoRAPlus(model, torch.optim.AdamW, lr=2e-4, ratio=16)
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    Source:
        arXiv:2402.12354
    """

    paper: ClassVar[str] = "arXiv 2402.12354"
    trains: ClassVar[str] = "what the adapter trains"
    keeps: ClassVar[str] = "what the optimizer class keeps"

    def __new__(  # type: ignore[misc]
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
        """Create the optimizer.

        Args:
            model: a model with adapters of lorafast, or a PEFT model with LoRA layers.
            optimizer_class: a class of torch.optim, or one with the same constructor.
            lr: the learning rate η_A, a number or a tensor, at least 0.
            ratio: η_B/η_A, a finite number above 0. The paper recommends about 16.
            lr_embedding: the learning rate of the factors of embeddings, at least 0.
            weight_decay: the weight decay of everything except biases and norms, at least 0. The
                default is 0, not the default of optimizer_class.
            **settings: further arguments of optimizer_class.

        Returns:
            An instance of optimizer_class.

        Raises:
            RuntimeError: the adapters are disabled.
            TypeError: optimizer_class is no optimizer class, or an argument has PEFT's name for it.
            ValueError: the model has no adapter, nothing trains, or an argument is out of range.
        """
        _check_arguments(optimizer_class, ratio, settings)
        rates = {"lr": lr, "lr_embedding": lr_embedding, "weight_decay": weight_decay}
        for name, value in rates.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r} must not be negative")
        rate_B = lr * ratio
        group_rates = {"A": lr, "embedding": lr_embedding, "B": rate_B, "B_no_decay": rate_B}
        parameters = _parameters_by_group(unwrap(model))
        groups = [
            {
                "params": parameters[name],
                "lr": rate,
                "weight_decay": 0.0 if name == "B_no_decay" else weight_decay,
                "name": name,
            }
            for name, rate in group_rates.items()
            if parameters[name]
        ]
        optimizer = optimizer_class(groups, lr=lr, **settings)  # type: ignore[call-arg]
        if optimizer_class.__name__ in _8BIT_OPTIMIZERS:
            _keep_embeddings_in_32_bits(model, optimizer_class)
        return optimizer


def _check_arguments(optimizer_class: object, ratio: object, settings: dict[str, Any]) -> None:
    for name in settings:
        if name in _PEFT_NAMES:
            raise TypeError(
                f"LoRAPlus({name}=...): this is spelled {_PEFT_NAMES[name]} in lorafast"
            )
    if not isinstance(optimizer_class, type) or not issubclass(
        optimizer_class, torch.optim.Optimizer
    ):
        raise TypeError(
            f"optimizer_class must be a torch.optim.Optimizer class, not {optimizer_class!r}"
        )
    if not is_finite_number(ratio) or ratio <= 0:
        raise ValueError(f"ratio={ratio!r} must be a finite number above 0")


def _parameters_by_group(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that train, by the name of their group."""
    group_names: dict[nn.Parameter, str] = {}
    has_adapter = bool(adapter_layers(model, required=False, require_enabled=True))
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                # A PEFT layer has its factors in modules named lora_A, lora_B, ….
                has_adapter = has_adapter or ".lora_" in f".{prefix}."
                name = _group_name(module, f"{prefix}.{key}", key, parameter)
                group_names.setdefault(parameter, name)
    if not has_adapter:
        adapter_layers(model)  # raises the error about a model without adapters
    if not group_names:
        raise ValueError(f"model {type(model).__name__} has no parameter that trains")
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    for parameter, name in group_names.items():
        groups[name].append(parameter)
    return groups


def _group_name(module: nn.Module, name: str, key: str, parameter: nn.Parameter) -> str:
    is_factor = key in ("lora_A", "lora_B", "lora_core")
    if (isinstance(module, Embedding) and is_factor) or ".lora_embedding_" in name:
        return "embedding"
    # Those of experts are matrices, a row for each expert.
    is_vector = parameter.dim() == 1 or key in ("lora_magnitude", "lora_bias")
    if "lora_B" not in name and not is_vector:
        return "A"
    return "B_no_decay" if "bias" in key or "Norm" in type(module).__name__ else "B"


def _keep_embeddings_in_32_bits(model: nn.Module, optimizer_class: type) -> None:
    """Let bitsandbytes keep the moments of embeddings in 32 bits.

    The rows of an embedding are updated rarely, and in 8 bits their moments would be lost.
    """
    package = importlib.import_module(optimizer_class.__module__.split(".")[0])
    manager = package.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})

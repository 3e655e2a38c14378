"""Where the values of a model's tensors are: in the model, offloaded, or in a state dict of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lorafast.models.module_names import canonical_name, unwrap


class TensorValues:
    """The values of a model's tensors by canonical name, sharded ones gathered from all ranks.

    Args:
        model: the model of the tensors. Those that accelerate has offloaded, which are on the meta
            device, are read from where its hooks keep them.
        state_dict: a state dict of the whole model to read from instead, for a model that does not
            hold its own values (FSDP, ZeRO-3).
    """

    def __init__(
        self, model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._modules = {
            canonical_name(name): module for name, module in unwrap(model).named_modules()
        }
        self._given = None
        if state_dict is not None:
            self._given = {canonical_name(name): value for name, value in state_dict.items()}

    def of_layer(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of a layer's own tensors, which are given by name."""
        return {name: self.read(f"{layer}.{name}", tensor) for name, tensor in tensors.items()}

    def read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the value of one tensor, detached.

        Args:
            name: its canonical name in the model.
            tensor: the tensor in the model.

        Raises:
            ValueError: the state dict lacks it, or has it in another shape.
        """
        if self._given is None:
            if tensor.is_meta:
                tensor = self._offloaded(name, tensor)
            return _gather(tensor)
        if name not in self._given:
            raise ValueError(f"state_dict lacks {name} {tuple(tensor.shape)} of the adapted model")
        value = _gather(self._given[name])
        if tensor.numel() and value.shape != tensor.shape:
            raise ValueError(
                f"state_dict: {name} {tuple(value.shape)} must be {tuple(tensor.shape)} as in the "
                "model"
            )
        return value

    def _offloaded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what accelerate's hooks hold of a tensor, or the tensor."""
        parent, _, child = name.rpartition(".")
        hook = vars(self._modules[parent]).get("_hf_hook")
        for part in (hook, *getattr(hook, "hooks", ())):
            weights = getattr(part, "weights_map", None)
            if weights is not None and child in weights:
                return weights[child]
        return tensor


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

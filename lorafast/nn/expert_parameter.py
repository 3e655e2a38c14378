"""An adapter on a Parameter [E,N,K] that another module holds, such as transformers' experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lorafast.nn.experts import Experts

# The child of a module of experts that holds its adapters. Names in files and messages lack it.
CONTAINER = "_lorafast"
# The name of lorafast's forward among transformers' implementations of experts.
IMPLEMENTATION = "lorafast"


class ExpertAdapters(nn.ModuleDict):
    """The adapters of a module of experts, by the name of the Parameter, in the module's order.

    Attributes:
        base_config: the config of the module without adapters.
        loading: the handle of the module's hook that tells the adapters about a loaded weight.
    """

    base_config: Any = None
    loading: Any = None


class ExpertParameter(nn.Module):
    """A Parameter of a module of experts: what an adapter is put on, and what is left without it.

    A weight or bias that is set stays its own until put() writes it into the module.

    Args:
        host: the module of experts.
        name: the name of the Parameter.
    """

    host: nn.Module
    name: str
    _own: dict[str, Any]

    def __init__(self, host: nn.Module, name: str) -> None:
        super().__init__()
        # Not as an attribute of nn.Module: the host would be a child.
        self.__dict__["host"], self.name, self._own = host, name, {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self._own = self._own | {name: value}
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The Parameter."""
        return self._own["weight"] if "weight" in self._own else getattr(self.host, self.name)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The biases [E,N] that belong to it, or None."""
        if "bias" in self._own:
            return self._own["bias"]
        return getattr(self.host, f"{self.name}_bias", None)

    @property
    def transposed(self) -> bool:
        """True if the Parameter is [E,K,N]."""
        return is_transposed(self.host)

    def matrix(self) -> torch.Tensor:
        """Return the weights as [E,N,K]: the Parameter, or a view of it."""
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def put(self) -> None:
        """Put the Parameter in the place of its adapter, which the module then lacks."""
        own = self._own
        for name, part in (("weight", self.name), ("bias", f"{self.name}_bias")):
            if name in own:
                setattr(self.host, part, own[name])
        adapters: Any = self.host._modules.get(CONTAINER)
        if adapters is None or self.name not in adapters:
            return
        del adapters[self.name]
        if not adapters:
            host: Any = self.host
            host.config = adapters.base_config
            adapters.loading.remove()
            del host._modules[CONTAINER]


class ParameterExperts(Experts):
    """Experts whose weight and bias are Parameters of another module, made by adapt.

    The module calls it: transformers' experts do by the implementation "lorafast", which the
    module's own copy of the config names.

    Attributes:
        host: the module of experts.
        parameter_name: the name of the weight there.
    """

    host: nn.Module
    parameter_name: str

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            setattr(self.host, self.parameter_name, value)
        elif name == "bias":
            setattr(self.host, f"{self.parameter_name}_bias", value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The Parameter of the module of experts."""
        return getattr(self.host, self.parameter_name)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The biases [E,N] in the module of experts, or None."""
        return getattr(self.host, f"{self.parameter_name}_bias", None)

    def put(self) -> None:
        """Make the layer a child of the module of experts, whose calls it then serves."""
        host: Any = self.host
        adapters = host._modules.get(CONTAINER)
        if adapters is None:
            adapters = ExpertAdapters().train(host.training)
            adapters.base_config = host.config
            host.add_module(CONTAINER, adapters)
            adapters.loading = host.register_load_state_dict_pre_hook(_tell_adapters)
            host.config = _of_implementation(host.config)
        present = {**adapters._modules, self.parameter_name: self}
        adapters._modules = {name: present[name] for name in host._parameters if name in present}

    def depth(self) -> int:
        """Return how many adapters PEFT would wrap around that of this layer's Parameter."""
        names = list(self.host._modules[CONTAINER]._modules)
        return len(names) - 1 - names.index(self.parameter_name)

    def _adopt(self, base: Any) -> None:
        self.__dict__["host"], self.parameter_name = base.host, base.name
        self.transposed = base.transposed
        self.num_experts, self.out_features, self.in_features = base.matrix().shape

    def _has_weight(self, state_dict: dict[str, Any], prefix: str) -> bool:
        # torch gives a child its own keys alone.
        return self.__dict__.pop("_weight_given", False)

    def reset_parameters(self) -> None:
        """Refuse: the weight belongs to the module of experts. reset_adapter() starts anew."""
        raise RuntimeError(
            f"weight {tuple(self.weight.shape)} belongs to a {type(self.host).__name__}: "
            "reset_adapter() starts the adapter anew on the weight that there is"
        )

    def refuse_computed_weight(self, action: str) -> None:
        """Raise RuntimeError if weight or bias is computed anew in every call."""
        for name in (self.parameter_name, f"{self.parameter_name}_bias"):
            tensor = getattr(self.host, name, None)
            if tensor is not None and name not in self.host._parameters:
                raise RuntimeError(
                    f"{name} {tuple(tensor.shape)} is computed from other tensors (a "
                    f"parametrization): remove that before {action}"
                )


def is_transposed(host: nn.Module) -> bool:
    """True if the Parameters of a module of experts are [E,K,N]."""
    return bool(getattr(host, "is_transposed", False))


def _tell_adapters(host: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Tell the adapters of a module of experts which weights a state dict has."""
    adapters: Any = host._modules[CONTAINER]
    for name, layer in adapters.items():
        layer.__dict__["_weight_given"] = f"{prefix}{name}" in state_dict


def _of_implementation(config: Any) -> Any:
    """Return a copy of a transformers config whose experts run on lorafast.

    A copy for one module: the model's own config, which files are written from, stays as it is, and
    a change of the model's implementation does not leave the adapters out.
    """
    changed = copy.copy(config)
    # The public attribute would set that of the sub-configs too, which the copy shares.
    changed.__dict__["_experts_implementation_internal"] = IMPLEMENTATION
    return changed

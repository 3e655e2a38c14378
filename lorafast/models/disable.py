"""lorafast.disable_adapter: run an adapted model as its base model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lorafast.models import extra_trainables
from lorafast.models.module_names import adapter_layers


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Return a context in which an adapted model computes what its base model computes.

    Adapters are skipped, and modules and biases that train have their initial values. What an init
    took out of a weight (LaMDA residual, PiSSA, LoRA-GA) is added to the product again, at the
    price of a low-rank product. An embedding or a head that load_adapter took from a file stays: it
    is part of the base that the file's adapter was trained on. Contexts may be nested.

    Args:
        model: a model that lorafast.adapt adapted.

    Returns:
        A context manager that yields None.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: a layer is merged, or initial values are not known (the model was on the meta
            device when it was adapted). Nothing is disabled then.

    Example:
        import torch, lorafast

        policy = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        x = torch.randn(4, 8)
        with torch.no_grad(), lorafast.disable_adapter(policy):
            reference = policy(x)  # for example the reference model of DPO
    """
    layers = [layer for layer in adapter_layers(model).values() if not layer.disabled]
    try:
        for layer in layers:
            layer.disable()
        with extra_trainables.initial_values(model):
            yield
    finally:
        for layer in layers:
            layer.enable()

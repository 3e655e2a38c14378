"""lorafast.disable_adapter: for a while, the base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lorafast.models import extra_trainables
from lorafast.models.module_names import adapted


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base model: adapters rest, and modules and biases that train are as they were before.

        with torch.no_grad(), lorafast.disable_adapter(policy):
            reference = policy(ids)

    What an init took out of a weight (LaMDA residual, PiSSA, LoRA-GA) is added to the product again: a low-rank path is its price.
    ValueError if the model has no adapted layer, RuntimeError if one is merged or its first values are not known; then nothing is
    disabled.
    """
    layers = [layer for layer in adapted(model).values() if not layer.disabled]
    try:
        for layer in layers:
            layer.disable()
        with extra_trainables.first_values(model):
            yield
    finally:
        for layer in layers:
            layer.enable()

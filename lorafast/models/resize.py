"""resize_token_embeddings of an adapted model, which is refused where it would lose an adapter.

transformers puts new modules in the place of the embedding and of the output head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafast.models import extra_trainables, observers
from lorafast.models.instance_methods import (
    adapted_transformers,
    replace_method,
    restore_method,
)
from lorafast.nn.adapter_layer import AdapterLayer

_METHOD = "resize_token_embeddings"


def _attach(model: nn.Module) -> None:
    for module in adapted_transformers(model):
        replace_method(module, _METHOD, _resize_token_embeddings)


def _detach(model: nn.Module) -> None:
    for module in model.modules():
        restore_method(module, _METHOD, _resize_token_embeddings)


observers.on_adapted.append(_attach)
observers.on_plain.append(_detach)


def _resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """Resize as transformers does. To its present size nothing changes.

    Raises:
        ValueError: the embedding or the output head has an adapter or trains, and would change.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    trained = [module for module in (embedding, head) if module is not None and _trains(module)]
    if trained:
        present = embedding.weight.shape[0]
        wanted = present if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == present:
            return embedding
        names = [name for name, module in model.named_modules() if module in trained]
        raise ValueError(
            f"new_num_tokens={wanted}: {' and '.join(names)}, made for {present} tokens, "
            "would lose what adapt put there: resize first, then adapt (lorafast.unload(model), "
            "resize_token_embeddings, lorafast.adapt)"
        )
    return type(model).resize_token_embeddings(
        model, new_num_tokens, pad_to_multiple_of, *args, **kwargs
    )


def _trains(module: nn.Module) -> bool:
    """True for an adapted layer, and for a module that trains as a whole or whose bias does."""
    return isinstance(module, AdapterLayer) or extra_trainables.has_initial_values(module)

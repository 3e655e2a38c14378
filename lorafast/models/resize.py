"""resize_token_embeddings of an adapted model, which is refused where it would lose an adapter.

transformers puts new modules in the place of the embedding and of the output head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.models import extra_trainables, file_weights, observers
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
        ValueError: an embedding of words or the output head has an adapter, trains or came from an
            adapter's file, and would change.
    """
    embedding = model.get_input_embeddings()
    present = embedding.weight.shape[0]
    names = [
        name
        for name, module in model.named_modules()
        if _would_lose(module) and _has_vocabulary(module, model)
    ]
    if names:
        wanted = present if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == present:
            return embedding
        raise ValueError(
            f"new_num_tokens={wanted}: {' and '.join(names)}, made for {present} tokens, "
            "would lose what adapt or load_adapter put there: resize first, then adapt "
            "(lorafast.unload(model), resize_token_embeddings, lorafast.adapt)"
        )
    return type(model).resize_token_embeddings(
        model, new_num_tokens, pad_to_multiple_of, *args, **kwargs
    )


def _would_lose(module: nn.Module) -> bool:
    """True if the module is adapted, trains as a whole or with its bias, or came from a file."""
    return (
        isinstance(module, AdapterLayer)
        or extra_trainables.has_initial_values(module)
        or file_weights.has_any(module)
    )


def _has_vocabulary(module: nn.Module, model: Any) -> bool:
    """True for the model's embedding and head, and for what transformers may replace with them.

    That is what holds the weight of one of them, and every nn.Embedding of as many rows: an encoder
    and a decoder may have tables of their own, which adapt has untied.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if module is embedding or module is head:
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    if isinstance(module, nn.Embedding) and len(weight) == len(embedding.weight):
        return True
    return any(weight is part.weight for part in (embedding, head) if part is not None)

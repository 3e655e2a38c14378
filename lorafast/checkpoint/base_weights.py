"""Base weights in an adapter's file: the tables and heads of a vocabulary that is not the base's.

PEFT writes a model's embeddings and output head where the vocabulary grew or where an adapter is on
them, and loads them into the model. They stay base weights: frozen, and no part of the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lorafast.methods.adapter import Adapter
from lorafast.models import file_weights
from lorafast.models.module_names import canonical_name, similar_names
from lorafast.runtime.torch_internals import storage_key

if TYPE_CHECKING:
    from lorafast.checkpoint.keys import KeyGroups

Tensors = dict[str, torch.Tensor]


def separate(groups: KeyGroups, extra: Tensors, model: nn.Module) -> KeyGroups:
    """Return the groups with base weights moved from extra to bases, all by tensor name."""
    parameters = file_weights.parameters_by_name(model)
    bases = {
        name: key for name, key in groups.extra.items() if name not in extra and name in parameters
    }
    return groups._replace(
        extra={name: key for name, key in groups.extra.items() if name not in bases},
        bases={f"{name}.weight": key for name, key in groups.bases.items()} | bases,
    )


def check(
    groups: KeyGroups, model: nn.Module, adapters: dict[str, Adapter], tensors: Tensors
) -> Tensors:
    """Return the tables and heads of a file that are not the base's, by tensor name.

    They differ from the model's, or are those that another file brought.

    Args:
        groups: the file's keys, as separate returns them.
        model: the model that the file is loaded into.
        adapters: of the layers. One whose init changes the weight will compute its own base weight.
        tensors: the file's tensors by key.

    Raises:
        ValueError: a base weight does not fit the model, or is no table and no head and differs.
    """
    if not groups.bases:
        return {}
    parameters, words = file_weights.parameters_by_name(model), _word_weights(model)
    from_file = {f"{name}.{tensor}" for name, _, tensor in file_weights.from_file(model)}
    differing: Tensors = {}
    of_storage: dict[int, str] = {}
    for name, key in groups.bases.items():
        if name not in parameters:
            raise ValueError(
                f"the file has {key}, which the model has not{similar_names(name, parameters)}"
            )
        adapter = adapters.get(name.removesuffix(".weight"))
        if adapter is not None and adapter.residual:
            continue
        own, given = parameters[name], tensors[key]
        _refuse_shape(key, given, own, name in words)
        value = given.to(own)
        if not torch.equal(value, own):
            if name not in words:
                raise ValueError(
                    f"{key} {tuple(given.shape)} is another weight than the model's own "
                    f"{tuple(own.shape)}: put it there first"
                )
            if not value.isfinite().all():
                raise ValueError(f"{key} {tuple(given.shape)} is not finite in {own.dtype}")
            differing[name] = value
        elif name in from_file:
            differing[name] = value
        first = of_storage.setdefault(storage_key(own), name)
        if not torch.equal(value, tensors[groups.bases[first]].to(own)):
            raise ValueError(
                f"{name} and {first} are one tensor {tuple(own.shape)} in the model, and two in "
                "the file"
            )
    return differing


def _word_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that have a row for each word: of tables, and of the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        f"{canonical_name(name)}.{tensor}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) or module is head
        for tensor in ("weight", "bias")
    }


def _refuse_shape(key: str, given: torch.Tensor, own: torch.Tensor, of_words: bool) -> None:
    if own.is_meta:
        raise ValueError(f"{key}: the model's is on the meta device: load it before the adapter")
    if given.shape == own.shape:
        return
    advice = (
        f"the vocabulary of the file has another size: model.resize_token_embeddings({len(given)}) "
        "first"
        if of_words and given.dim()
        else "put it there first"
    )
    raise ValueError(
        f"{key} {tuple(given.shape)} is another weight than the model's own {tuple(own.shape)}: "
        f"{advice}"
    )

"""lorafast.merged: a context in which the base weights hold the adapters, undone bit for bit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lorafast.models.module_names import canonical_name, format_names, unwrap
from lorafast.models.target_modules import parameter_owners
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.runtime.torch_internals import storage_key


@contextlib.contextmanager
def merged(
    model: nn.Module, untie: bool = False, keep_on: torch.device | str | None = "cpu"
) -> Iterator[None]:
    """Return a context in which the adapters are folded into the base weights, in place.

    Afterwards the base weights are what they were, bit for bit, also after an exception, and the
    adapters work again. Inside, a layer costs what its base layer costs, as merge() would leave
    it: rollouts and evaluation run so between training steps. Weights stay the same Parameters on
    the same storages, which optimizers, DDP and engines that share them go on using. Layers of
    lorafast.adapt are merged as by lorafast.merge, each weight rounded once; PEFT's, accelerated or
    not, by PEFT's own merging of their active adapters.

    It keeps a copy of every weight that it changes, as many bytes as those weights have, on
    keep_on. Entering costs a merge and that copy, leaving the copy back. A smaller record (of the
    difference in units of the last place) would be exact only if the product of the factors came
    out the same to the last bit at both ends, and if nothing else wrote into the weights meanwhile.

    Inside, state_dict() of an adapted model raises, because it holds the adapter beside the merged
    weight: read the weights by named_parameters(). Backward through a forward from before the
    context raises if it needs a weight. DoRA's cached norms are computed anew afterwards.

    Args:
        model: a model that lorafast.adapt adapted, a layer of it, a PeftModel, a model with
            injected PEFT adapters, or any of them inside DDP or torch.compile.
        untie: give a weight that is tied to another (an output head to its embedding) a tensor of
            its own inside the context. The tied tensor itself does not change.
        keep_on: the device of the copies; None is each weight's own, which on a GPU is quicker and
            takes that memory there.

    Returns:
        A context manager that yields None.

    Raises:
        ValueError: the model has no adapter, a weight is tied to another and untie is False, or a
            merged weight would not be finite.
        RuntimeError: the model is merged already, or its adapters are disabled, a weight is on the
            meta device or computed from other tensors.
        NotImplementedError: a weight is quantised or sharded, or a layer of PEFT is of a kind whose
            merging replaces tensors.
        TypeError: model is no module. Every error leaves the model as it was.

    Example:
        import torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        weight = model[0].weight.clone()
        with torch.no_grad(), lorafast.merged(model):
            model(torch.randn(4, 8))  # for example the rollouts of a step
        assert torch.equal(model[0].weight, weight)
    """
    inner = unwrap(model)
    own, theirs = _adapted_layers(inner), _peft_layers(inner)
    _check_state(model, own, theirs)
    weights = [layer.weight for layer in own.values()]
    peft_merge = _peft_merge() if theirs else None
    for layer in theirs.values():
        weights += peft_merge.changed_parameters(layer).values()
    tied = _tied(inner, weights, untie)
    undo = contextlib.ExitStack()
    try:
        with _plain_arithmetic(weights):
            for layer in own.values():
                _fold(layer, tied, keep_on, undo)
            for layer in theirs.values():
                peft_merge.fold(layer, tied, keep_on, undo)
        yield
    finally:
        with _plain_arithmetic(weights):
            undo.close()


def _adapted_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer)
    }


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    # A model with PEFT's layers has imported PEFT.
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def _check_state(model: nn.Module, own: dict[str, AdapterLayer], theirs: dict[str, Any]) -> None:
    """Raise what merged() raises before anything changes, ties apart."""
    if not own and not theirs:
        raise ValueError(
            f"model {type(model).__name__} has no adapter: give it one with lorafast.adapt or "
            "peft.get_peft_model"
        )
    layers = own | theirs
    if done := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"model {type(model).__name__} is merged already, in {format_names(done)}: leave the "
            "outer lorafast.merged(model), or unmerge, before lorafast.merged(model)"
        )
    disabled = [name for name, layer in own.items() if layer.disabled]
    disabled += [name for name, layer in theirs.items() if layer.disable_adapters]
    if disabled:
        raise RuntimeError(
            f"the adapters of {format_names(disabled)} are disabled: enter lorafast.merged(model) "
            "outside of that"
        )
    for name, layer in own.items():
        with _naming(name):
            layer.refuse_merge()
    for name, layer in theirs.items():
        with _naming(name):
            _peft_merge().refuse_merge(layer)


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """A context whose errors begin with the name of the layer."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise type(error)(f"{layer}: {error}") from error


def _tied(model: nn.Module, weights: Iterable[torch.Tensor], untie: bool) -> set[int]:
    """Return the storages of these weights that another module holds too.

    ValueError if there is one and untie is False.
    """
    owners = parameter_owners(model)
    tied = {
        key: owners[key].values()
        for key in map(storage_key, weights)
        if len(owners.get(key, ())) > 1
    }
    if tied and not untie:
        names = " and ".join(next(iter(tied.values())))
        raise ValueError(
            f"merging would change {names}, which are one tensor: merged(model, untie=True) gives "
            "the adapted one its own for that time"
        )
    return set(tied)


@contextlib.contextmanager
def _plain_arithmetic(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """A context without gradients, autocast and inference mode, whatever the caller's modes are."""
    weights = list(weights)
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.no_grad())
        # Outside of it a tensor that was made in inference mode may not be written to.
        if not any(weight.is_inference() for weight in weights):
            modes.enter_context(torch.inference_mode(False))
        for kind in {weight.device.type for weight in weights}:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def _fold(
    layer: AdapterLayer,
    tied: set[int],
    keep_on: torch.device | str | None,
    undo: contextlib.ExitStack,
) -> None:
    """Merge a layer, and add what undoes that."""
    if storage_key(layer.weight) in tied:
        undo.callback(setattr, layer, "weight", layer.weight)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    undo.callback(layer.unmerge)
    layer.merge(keep=True, keep_on=keep_on)


def _peft_merge() -> ModuleType:
    """Return lorafast.integrations.peft_merge, imported on first use because it imports PEFT."""
    from lorafast.integrations import peft_merge

    return peft_merge

"""What transformers notes of a model that it loaded quantised, kept right while it has adapters.

Trainer refuses a model with is_quantized that is no PeftModel: nothing in it could train. And a
model that was merged into dense weights must not be saved with a quantization_config.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafast.models import observers
from lorafast.models.instance_methods import adapted_transformers
from lorafast.quantised import formats

_FLAG = "is_quantized"
# Attribute of an adapted model whose flag is taken away.
_TAKEN = "_lorafast_is_quantized"


def _take(model: nn.Module) -> None:
    """Let Trainer accept the transformers models that have adapters now."""
    for module in adapted_transformers(model):
        if vars(module).get(_FLAG) is True:
            vars(module).update({_FLAG: False, _TAKEN: True})


def _give_back(model: nn.Module) -> None:
    """Undo _take, and drop transformers' config of what is quantised no longer."""
    for module in model.modules():
        if not vars(module).pop(_TAKEN, False):
            continue
        vars(module)[_FLAG] = True
        quantiser: Any = getattr(module, "hf_quantizer", None)
        if quantiser is not None and not any(formats.of(part) for part in module.modules()):
            quantiser.remove_quantization_config(module)


observers.on_adapted.append(_take)
observers.on_plain.append(_give_back)

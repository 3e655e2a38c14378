"""The formats of quantised weights, and which of them a module's weight is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.quantised.bitsandbytes_4bit import BitsAndBytes4Bit
from lorafast.quantised.bitsandbytes_8bit import BitsAndBytes8Bit
from lorafast.quantised.dequantising_layer import DequantisingLayer
from lorafast.quantised.fp8 import FP8
from lorafast.quantised.torchao_tensor import TorchaoTensor
from lorafast.quantised.weight import QuantisedWeight

# In the order in which they are tried: an FP8 weight of compressed-tensors needs no function.
FORMATS: tuple[type[QuantisedWeight], ...] = (
    BitsAndBytes4Bit,
    BitsAndBytes8Bit,
    TorchaoTensor,
    FP8,
    DequantisingLayer,
)


def of(module: nn.Module) -> QuantisedWeight | None:
    """Return the module's quantised weight, or None if it has none of a known format.

    It imports no library: a module is known by its class, its weight's class or its dtype. Ask
    the result `why_not` before anything else.
    """
    for weight_format in FORMATS:
        if weight_format.matches(module):
            return weight_format(module)
    return None


def held_weight(module: Any) -> torch.Tensor:
    """Return the tensor that holds a module's weight; of a quantised one its numbers in few bits.

    Not every quantised module has it under the name `weight`.
    """
    quantised = of(module)
    return module.weight if quantised is None else quantised.packed

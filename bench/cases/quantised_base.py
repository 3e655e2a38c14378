"""A model whose linears have quantised weights, and the dense model that computes the same."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from lorafast.bench.cases.choices import DENSE
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.quantised import formats
from lorafast.quantised.bitsandbytes_8bit import BitsAndBytes8Bit
from lorafast.runtime import extras


def check_available(
    base_format: str, impl: Impl, trains_base: bool, needs_gradients: bool = False
) -> None:
    """Raise Unavailable if the format's library is not installed, or its weights had to train.

    needs_gradients: the method's init reads gradients of the weights.
    """
    if base_format == DENSE:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = extras.how_to_install("quant")
        raise Unavailable("missing", f"bitsandbytes is not installed: {hint}")
    if trains_base:
        raise Unavailable("unsupported", "a quantised weight does not train")
    if needs_gradients:
        raise Unavailable("unsupported", "a quantised weight has no gradient to start from")
    if impl.compile:
        raise Unavailable("unsupported", "bitsandbytes' layers are no part of a compiled graph")


def quantise(model: nn.Module, base_format: str) -> None:
    """Replace every nn.Linear of a model by bitsandbytes' layer on its weight, in place.

    The layers compute in the dtype of the weight. They are made without lorafast.quantize_base, so
    that the frozen rows and PEFT's owe nothing to lorafast.
    """
    if base_format == DENSE:
        return
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            _replace(model, path, _quantised(linear, base_format))
    # It logs of every int8 product in eval mode that x is rounded to fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # PEFT asks the model which of its layers' classes to take.
    model.is_loaded_in_8bit = base_format == "int8"
    model.is_loaded_in_4bit = not model.is_loaded_in_8bit


def _quantised(linear: nn.Linear, base_format: str) -> nn.Module:
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    weight = linear.weight
    if base_format == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes,
            compute_dtype=weight.dtype,
            compress_statistics=base_format == "nf4",
            quant_type="nf4",
        )
        # On CPUs with AVX512-BF16 a forward in eval mode packs the weight anew, in place, and from
        # then on x gets no gradient.
        layer.support_avx512bf16_for_cpu = False
    layer.to(weight.dtype).load_state_dict(linear.state_dict())
    return layer.to(weight.device).requires_grad_(False)


def keep_scales(model: nn.Module) -> None:
    """Let PEFT's DoRA take more than one step on the CPU's int8 layers, in place.

    Its norm moves the weight "to the CPU" in every call, by which bitsandbytes' parameter loses the
    scales of the rows; the layer's state has them.
    """

    def restore(layer: nn.Module, _: tuple) -> None:
        if layer.weight.CB is not None and layer.weight.SCB is None:
            layer.weight.SCB = layer.state.SCB

    for layer in model.modules():
        if isinstance(formats.of(layer), BitsAndBytes8Bit):
            layer.register_forward_pre_hook(restore)


def dense_linear(layer: nn.Module) -> nn.Linear:
    """Return a layer as a dense linear: itself, or the dequantised weight beside its bias."""
    quantised = formats.of(layer)
    if quantised is None:
        return layer
    N, K = quantised.shape
    dense = nn.Linear(K, N, layer.bias is not None, device="meta")
    weight = _dequantised(layer).to(quantised.dtype)
    dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return dense


@torch.no_grad()
def _dequantised(layer: nn.Module) -> torch.Tensor:
    """Return W [N,K] by bitsandbytes: by lorafast's own code its faults would not show."""
    from bitsandbytes import functional

    weight = layer.weight
    if not isinstance(formats.of(layer), BitsAndBytes8Bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


def make_dense(model: nn.Module) -> None:
    """Replace every quantised layer of a model by its dense linear, in place."""
    for path, layer in list(model.named_modules()):
        if formats.of(layer) is not None:
            _replace(model, path, dense_linear(layer))


def statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return what quantised layers hold beside their parameters, such as the scales of blocks."""
    found = []
    for layer in model.modules():
        if formats.of(layer) is not None:
            named = dict(layer.named_parameters())
            found += [value for name, value in layer.state_dict().items() if name not in named]
    return found


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)

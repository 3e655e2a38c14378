"""lorafast.quantize_base: the linears of a loaded dense model, quantised in place."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.row_blocks import row_blocks
from lorafast.methods.lora import LoRA
from lorafast.models import extra_trainables, observers, task_heads
from lorafast.models import loftq as loftq_start
from lorafast.models.adapt import (
    adapt,
    refuse_parallel,
    replace_module,
    weight_matrix,
    with_heads,
)
from lorafast.models.adapt_spec import AdaptSpec
from lorafast.models.module_names import adapter_layers, canonical_name, require_module
from lorafast.models.tables import text_table
from lorafast.models.target_modules import find_targets, is_conv1d, parameter_owners
from lorafast.quantised import formats
from lorafast.quantised.fp8_linear import FP8Linear
from lorafast.quantised.weight import ON_META, QuantisedWeight
from lorafast.runtime import extras
from lorafast.runtime.torch_internals import share_call_hooks, storage_key

BITS = ("fp8", "nf4", "int8")
# bitsandbytes quantises to int8 from fp16, which has nothing larger.
_LARGEST = {"fp8": float("inf"), "nf4": float("inf"), "int8": torch.finfo(torch.float16).max}
# How many layers a report prints.
_SHOWN = 10


class QuantisedLayer(NamedTuple):
    """How much a layer's weight changed when it was quantised, and its bytes before and after.

    Attributes:
        error: ‖Q(W) - W‖ / ‖W‖, where Q(W) is the quantised weight; with LoftQ that of Q(W) + s·BA.
        bytes_before: bytes of the dense weight.
        bytes_after: bytes of the quantised one, with its scales and tables, in a state dict.
    """

    error: float
    bytes_before: int
    bytes_after: int


class QuantisationReport(NamedTuple):
    """The error and the size of every layer that quantize_base quantised.

    str() gives a table of the layers with the largest errors.

    Attributes:
        bits: the format.
        layers: the layers by name, in the order of the model.
    """

    bits: str
    layers: dict[str, QuantisedLayer]

    def __str__(self) -> str:
        before = sum(layer.bytes_before for layer in self.layers.values())
        after = sum(layer.bytes_after for layer in self.layers.values())
        first = (
            f"{len(self.layers)} layers in {self.bits}: {_size(before)} of weights became "
            f"{_size(after)}"
        )
        worst = sorted(self.layers.items(), key=lambda item: -item[1].error)
        lines = [
            (name, f"{layer.error:.2e}", _size(layer.bytes_before), _size(layer.bytes_after))
            for name, layer in worst[:_SHOWN]
        ]
        header = ("layer", "error", "before", "after")
        table = text_table(header, lines, right=header[1:])
        if rest := len(worst) - len(lines):
            table.append(f"{rest} more, of errors up to {worst[_SHOWN][1].error:.2e}")
        return "\n".join([first, *table])


@torch.no_grad()
def quantize_base(
    model: nn.Module,
    bits: str,
    target_modules: str | Collection[str] = "all-linear",
    *,
    exclude_modules: str | Collection[str] | None = None,
    loftq: LoRA | None = None,
    iterations: int = 1,
    **options: Any,
) -> QuantisationReport:
    """Quantise the linears of a dense model in place, before lorafast.adapt, and return the errors.

    All checks come before the first change. Then each layer's dense weight is freed before the next
    layer is quantised, on the device where it is, unless somebody else holds it (an optimizer, a
    state dict). What fails midway, such as an allocation, leaves the layers before it quantised.
    Biases stay the same Parameters; hooks of a layer's call move to the quantised one.
    save_pretrained refuses such a base, which from_pretrained could not read (docs/quantised.md).

    With `loftq` each layer's A and B start at the error of its quantisation (LoftQ), and the model
    is adapted afterwards. Q₁ is what it is without LoftQ; those of more iterations are other
    weights, which belong to the adapter's file: make them again by the same call, before
    load_adapter:

        Q₁ = Q(W)        s·B₁A₁ = the first r singular triplets of W - Q₁
        Qₜ = Q(W - s·Bₜ₋₁Aₜ₋₁)        s·BₜAₜ = those of W - Qₜ

    Args:
        model: any module that is not adapted yet, with weights in fp32, bf16 or fp16.
        bits: "fp8" is e4m3 with one scale a row, in torch alone; "nf4" is bitsandbytes' Linear4bit
            with double quantisation, in blocks of 64; "int8" is its Linear8bitLt, which keeps no
            fp16 weights, with the threshold 6.
        target_modules: the linears, as in lorafast.adapt; "all-linear" leaves out the output head.
        exclude_modules: those to leave out, as in lorafast.adapt.
        loftq: a lorafast.LoRA, which the model is given and which starts so; None: no adapter.
        iterations: how often LoftQ alternates.
        options: further arguments of lorafast.adapt (task_type, rank_pattern, …), with loftq.

    Returns:
        A QuantisationReport: bits, and for each layer its relative error and its bytes before and
        after. print it for a table.

    Raises:
        ValueError: bits is no such word; a name matches nothing; the model is adapted already; a
            weight is tied to another, on the meta device, empty, not finite, or too large for int8;
            iterations is below 1, or not 1 without loftq; r exceeds min(N, K) or alpha is not
            positive with loftq, or adapt's own reasons there.
        TypeError: a match is no plain nn.Linear or Conv1D, is quantised already, is fp64, has a
            patched forward (offloading), model is no module or a linear itself, or loftq no LoRA.
        ModuleNotFoundError: bitsandbytes is not installed: it comes with the extra `quant`.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        print(lorafast.quantize_base(model, "fp8"))
        lorafast.adapt(model, lorafast.LoRA(r=4))

    Source:
        NF4, double quantisation: arXiv:2305.14314; LLM.int8(): arXiv:2208.07339; LoftQ:
        arXiv:2310.08659
    """
    checks.word("bits", bits, BITS)
    require_module(model)
    if isinstance(model, nn.Linear):
        raise TypeError(f"model is itself a {type(model).__name__} and cannot be replaced in place")
    refuse_parallel(model)
    if bits != "fp8":
        with extras.required("quant"):
            importlib.import_module("bitsandbytes")
    if loftq is None and options:
        raise TypeError(f"{', '.join(options)}: arguments of lorafast.adapt, without loftq")
    checks.whole("iterations", iterations)
    if loftq is None and iterations != 1:
        raise ValueError(f"iterations={iterations}: without loftq a weight is quantised once")
    spec = _spec(model, target_modules, exclude_modules, loftq, options)
    # The list holds names alone: a module in it would keep its dense weight.
    names = _checked_names(model, bits, spec)
    adapters: dict[str, LoRA] = {}
    if loftq is not None:
        adapters = loftq_start.checked_adapters(model, names, spec)
    observers.tell_quantised(model)
    layers, starts = {}, {}
    for one in names:
        name = canonical_name(one[0])
        layers[name], starts[name] = _quantise_layer(
            model, one, bits, adapters.get(name), iterations
        )
    if loftq is not None:
        adapt(model, loftq, target_modules, exclude_modules=exclude_modules, **options)
        for name, layer in adapter_layers(model).items():
            layer.take(starts[name])
    return QuantisationReport(bits, layers)


def _spec(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
    loftq: LoRA | None,
    options: dict[str, Any],
) -> AdaptSpec:
    """Return the spec with which adapt chooses the layers, and refuses some."""
    if loftq is None:
        # Which adapter it would be has no part in that.
        return AdaptSpec(LoRA(r=1), target_modules, exclude_modules)
    loftq_start.check_adapter(loftq)
    fields = {key: one for key, one in options.items() if key not in ("seed", "adapter_dtype")}
    return with_heads(model, AdaptSpec(loftq, target_modules, exclude_modules, **fields))


def _checked_names(model: nn.Module, bits: str, spec: AdaptSpec) -> list[list[str]]:
    """Return all names of each linear to quantise. Raises what quantize_base raises of a layer."""
    targets = find_targets(model, spec)
    # For its refusals.
    extra_trainables.collect(model, spec, targets)
    owners = parameter_owners(model)
    for module, names in targets.items():
        if why := _why_not_linear(module):
            raise TypeError(
                f"target_modules={spec.target_modules!r} matches {names[0]}, which {why}"
            )
    for module, names in targets.items():
        weight: Any = module.weight
        holders = {} if weight.is_meta else owners[storage_key(weight)]
        if len(holders) > 1:
            raise ValueError(
                f"{' and '.join(holders.values())} are one tensor: leave {names[0]} out by "
                "exclude_modules"
            )
    for module, names in targets.items():
        if why := _why_not_values(cast(torch.Tensor, module.weight), bits):
            raise ValueError(f"{names[0]}: {why}")
    return list(targets.values())


def _why_not_linear(module: nn.Module) -> str | None:
    if (quantised := formats.of(module)) is not None:
        return f"is quantised already: {quantised.kind}"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"is a {type(module).__name__}, and no linear layer"
    weight = cast(torch.Tensor, module.weight)
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"has a {type(weight).__name__} for a weight: quantise it before it is sharded"
    if weight.dtype not in QuantisedWeight.DTYPES:
        return f"has a weight in {weight.dtype}: cast it to fp32, bf16 or fp16 first"
    return None


def _why_not_values(weight: torch.Tensor, bits: str) -> str | None:
    if weight.is_meta:
        return ON_META
    if not weight.numel():
        return f"its weight {tuple(weight.shape)} has no elements"
    # A NaN is the largest of any block, and no comparison with it is True.
    largest = [weight[block].abs().amax() for block in row_blocks(weight)]
    found = torch.stack(largest).amax().item()
    if not found < float("inf"):
        return f"its weight {tuple(weight.shape)} is not finite"
    if found > _LARGEST[bits]:
        return f"its weight has {found:.4g}, beyond what bitsandbytes quantises to {bits}"
    return None


def _quantise_layer(
    model: nn.Module, names: list[str], bits: str, adapter: LoRA | None, iterations: int
) -> tuple[QuantisedLayer, dict[str, torch.Tensor]]:
    """Quantise one layer of the model. Returns its adapter's values too, if it has one."""
    dense = model.get_submodule(names[0])
    weight = weight_matrix(dense)
    values: dict[str, torch.Tensor] = {}
    make = functools.partial(
        {"fp8": _fp8, "nf4": _nf4, "int8": _int8}[bits], bias=cast(Any, dense.bias)
    )
    if adapter is None:
        module = make(weight)
        error = _error(formats.of(module), weight)
    else:
        module, values, error = loftq_start.start(weight, make, _dequantised, adapter, iterations)
    share_call_hooks(dense, module)
    task_heads.keep_loaded_mark(cast(Any, dense.weight), cast(Any, module.weight))
    replace_module(model, names, module.train(dense.training))
    held = module.state_dict()
    after = sum(one.nbytes for name, one in held.items() if name != "bias")
    return QuantisedLayer(error, weight.nbytes, after), values


def _dequantised(module: nn.Module) -> torch.Tensor:
    return formats.of(module).dense(torch.float32)


def _fp8(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    N, K = weight.shape
    module = FP8Linear(K, N, bias, weight.dtype, weight.device)
    formats.of(module).requantise(weight)
    return module


def _nf4(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    import bitsandbytes as bnb

    N, K = weight.shape
    module = bnb.nn.Linear4bit(K, N, bias is not None, quant_type="nf4", device="meta")
    packed: Any = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
    )
    # The move quantises it, from whatever device.
    module.weight = packed.to(weight.device)
    module.bias = bias
    return module


def _int8(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    import bitsandbytes as bnb
    from bitsandbytes.functional import int8_vectorwise_quant

    N, K = weight.shape
    module = bnb.nn.Linear8bitLt(
        K, N, bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    # Int8Params quantises what comes from a CPU alone.
    packed, row_max, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    module.weight = bnb.nn.Int8Params(
        packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=row_max
    )
    module.bias = bias
    return module


def _error(quantised: QuantisedWeight, weight: torch.Tensor) -> float:
    """Return ‖Q(W) - W‖ / ‖W‖ from blocks of rows; 0 for a weight of zeros."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for block in row_blocks(weight):
        rows = weight[block].float()
        difference = quantised.rows(block.start, block.stop, torch.float32) - rows
        sums += torch.stack([difference.double().square().sum(), rows.double().square().sum()])
    error, size = sums.tolist()
    return (error / size) ** 0.5 if size else 0.0


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"

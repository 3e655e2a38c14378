"""lorafast.explain: what each adapted layer saves for backward and which backend runs it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from lorafast.engine import dispatch, host, masks, plain_products
from lorafast.engine.formula import resolve_keep, saved_mask
from lorafast.engine.grouped import routes as grouped_routes
from lorafast.engine.grouped.groups import of_expert
from lorafast.engine.problem import (
    PRIMITIVES,
    CallOptions,
    GradMask,
    LayerTensors,
    Problem,
)
from lorafast.models import adapt_record
from lorafast.models.explanation import Explanation, Row
from lorafast.models.gradient_check import unreached_adapters
from lorafast.models.module_names import canonical_name, require_module
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.embedding import Embedding
from lorafast.nn.expert_parameter import ParameterExperts
from lorafast.nn.quantised_linear import QuantisedLinear
from lorafast.runtime import devices, symlinks
from lorafast.runtime.torch_internals import is_foreign_subclass


class LayerCall(NamedTuple):
    """The call of one adapter of a layer in a training step, as far as explain needs it.

    Attributes:
        method: the text of Row.method.
        tensors: the layer's tensors; those that require a gradient get one, and so does x.
        options: the options of the call; its keep is ignored.
        keep: the adapter's keep, not resolved.
        detach_norm: the adapter's detach_norm.
        merged: the layer is merged and runs as a plain linear.
        bypass: why no op of lorafast runs, or None.
        few_tokens: what runs instead of the op where engine.plain_products expects it to be
            quicker.
        quantised: the format of a quantised weight in words, or None.
    """

    method: str
    tensors: LayerTensors
    options: CallOptions
    keep: str = "auto"
    detach_norm: bool = True
    merged: bool = False
    bypass: str | None = None
    few_tokens: str = "plain torch products"
    quantised: str | None = None

    @property
    def runs_op(self) -> bool:
        """True if an op of lorafast runs."""
        return not (self.merged or self.bypass or self.tensors.weight.requires_grad)

    def needed_grads(self) -> GradMask:
        """Return the gradients that a training step needs."""
        trains = {
            name: tensor is not None and tensor.requires_grad
            for name, tensor in self.tensors._asdict().items()
        }
        trains["x"] = True
        trains["norm"] = not self.detach_norm and (trains["lora_A"] or trains["lora_B"])
        return GradMask(**{name: trains[name] for name in GradMask._fields})

    def resolved_options(self, needs: GradMask) -> CallOptions:
        """Return the options with keep resolved."""
        tensors = self.tensors
        has_bias = tensors.bias is not None or tensors.lora_bias is not None
        trains_gain = tensors.magnitude is not None and needs.gain
        keep = resolve_keep(self.keep, self.options, trains_gain, has_bias, tensors.weight.dtype)
        return self.options._replace(keep=keep)


def explain(model: nn.Module, tokens: int = 2048) -> Explanation:
    """Return, for each adapted layer, its saved bytes, the backend of each primitive, and why.

    Covers lorafast's layers and the layers of a PEFT model after lorafast.accelerate, those with
    one row for each adapter. Nothing is computed; activations are assumed to have the dtype of the
    weight. The table has one line for layers that differ in the indices of their names alone, and a
    total; a notebook shows it in HTML. Between backward() and zero_grad() a line names the adapters
    that got no gradient while others did. A GPU whose kernels have not been tried is tried first.
    For a GPU a model's ratio of a training step to the frozen layer's is there, too.

    Args:
        model: the model, or one layer.
        tokens: number of rows M of the calls to explain.

    Returns:
        An Explanation with the field rows, one for each layer; print it for the table.

    Raises:
        TypeError: model is no module.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        lorafast.adapt(model, lorafast.DoRA(r=8))
        print(lorafast.explain(model))
    """
    require_module(model)
    reasons = (symlinks.why_missing(folder) for folder in symlinks.LINKS)
    rows = (
        _row(canonical_name(name) if isinstance(module, ParameterExperts) else name, call, tokens)
        for name, module in model.named_modules()
        for call in _calls(module, tokens)
    )
    lost = (
        f"{name}: its adapter is gone, {kind} is there now"
        for name, kind in adapt_record.lost_layers(model).items()
    )
    missing = tuple(reason for reason in reasons if reason)
    return Explanation(tuple(rows), missing, tuple(lost), unreached_adapters(model))


def _calls(module: nn.Module, tokens: int) -> list[LayerCall]:
    """Return the calls of a layer's adapters; none for other modules."""
    if isinstance(module, AdapterLayer):
        return [_adapter_layer_call(module)]
    # integrations.peft_linear.Linear, found by its method: PEFT takes seconds to import.
    explain_calls = getattr(type(module), "lorafast_calls", None)
    return explain_calls(module, tokens) if explain_calls else []


def _adapter_layer_call(layer: AdapterLayer) -> LayerCall:
    adapter = layer.adapter
    options = layer._options()._replace(
        dropout=getattr(getattr(layer, "lora_dropout", None), "p", 0.0),
        dropout_on=adapter.dropout_on,
        frozen_columns=layer.frozen_columns,
    )
    quantised = layer.quantised if isinstance(layer, QuantisedLinear) else None
    bypass = None
    if layer.disabled:
        bypass = "disabled: the layer runs as its base"
    elif quantised is None and is_foreign_subclass(layer.weight):
        kind = f"{type(layer.weight).__module__}.{type(layer.weight).__qualname__}"
        bypass = f"torch's own operations, because the weight is a {kind}"
    elif isinstance(layer, Embedding):
        bypass = "a lookup on plain torch, no product with the table"
    return LayerCall(
        type(adapter).__name__,
        layer._tensors(None if quantised is None else quantised.stand_in()),
        options,
        adapter.keep,
        adapter.detach_norm,
        layer.merged,
        bypass,
        quantised=None if quantised is None else quantised.kind,
    )


def _row(name: str, call: LayerCall, tokens: int) -> Row:
    tensors, needs = call.tensors, call.needed_grads()
    options = call.resolved_options(needs)
    weight = tensors.weight
    (N, K), R = weight.shape[-2:], tensors.lora_A.shape[-2]
    saved: int | None = 0 if call.merged else None
    referenced: dict[str, int] = {}
    backends: dict[str, str] = {}
    why_not: dict[str, tuple[str, ...]] = {}
    notes = _notes(call, options)
    modelled = None
    experts = weight.dim() == 3
    if experts:
        tensors = of_expert(tensors, 0)
    if call.runs_op and not experts and _runs_products(tensors, options, tokens):
        notes += (f"{tokens} tokens are few: {call.few_tokens} instead of the op",)
    elif call.runs_op:
        mask = saved_mask(needs, options, tensors.magnitude is not None)
        element_size = weight.element_size()
        saved = (R * mask.h + N * mask.z) * element_size
        sizes = {"x": K * element_size, "y": N * element_size}
        referenced = {key: size for key, size in sizes.items() if getattr(mask, key)}
        for primitive, problem in _problems(tensors, options, tokens).items():
            grouped = experts and primitive != "row_norm"
            choose = grouped_routes.choice if grouped else partial(dispatch.choice, primitive)
            backends[primitive], refusals = choose(problem)
            if not experts:
                notes += _route_notes(backends[primitive], primitive, problem)
            for backend, reasons in refusals.items():
                why_not[backend] = tuple(dict.fromkeys(why_not.get(backend, ()) + reasons))
        if not experts:
            modelled = _modelled_ratio(tokens, tensors, options, needs)
        notes += _mask_notes(backends, options, weight)
        if not experts and (why := host.why_python({*backends.values()}, weight.device)):
            notes += (f"calls are made in Python: {why}",)
    name = name or "(this layer)"
    return Row(
        name, call.method, (N, K), R, saved, tuple(referenced), backends, why_not, notes,
        referenced, weight.device.type, modelled,
    )  # fmt: skip


def _runs_products(tensors: LayerTensors, options: CallOptions, tokens: int) -> bool:
    """True if a call of so few tokens runs as plain torch products."""
    if plain_products.why_not(tokens, tensors, options, tensors.weight.dtype):
        return False
    return not host.serves(_problems(tensors, options, tokens))


def _problems(tensors: LayerTensors, options: CallOptions, tokens: int) -> dict[str, Problem]:
    """Return the problem of each primitive that a training step runs."""
    x = tensors.weight.new_empty(0, tensors.weight.shape[1])
    step = replace(dispatch.problem_of(x, tensors, options), M=tokens)
    problems = {primitive: step for primitive in PRIMITIVES if primitive != "row_norm"}
    if tensors.magnitude is not None:
        problems["row_norm"] = dispatch.norm_problem_of(tensors, options)
    return problems


def _route_notes(backend: str, primitive: str, problem: Problem) -> tuple[str, ...]:
    if backend == "none":
        return ()
    route = dispatch.describe_route(backend, primitive, problem)
    return (f"{primitive} by {backend}: {route}",) if route else ()


def _modelled_ratio(
    tokens: int, tensors: LayerTensors, options: CallOptions, needs: GradMask
) -> float | None:
    """Return the modelled time of the step by the frozen layer's; None on what is no GPU."""
    if devices.of(tensors.weight.device).vendor in ("cpu", "meta"):
        return None
    if symlinks.why_missing("kernels"):
        return None
    # Imported where it is needed: it is no part of what a call imports.
    from lorafast.engine import step_model

    return step_model.ratio(tokens, tensors, options, needs)


def _mask_notes(
    backends: dict[str, str], options: CallOptions, weight: torch.Tensor
) -> tuple[str, ...]:
    """Return what makes the dropout mask on a GPU."""
    if not options.dropout or weight.is_cpu or weight.is_meta:
        return ()
    drops = ("project", "grad_input", "grad_project")
    eager = ", ".join(name for name in drops if backends.get(name) == "eager")
    if not eager:
        return ()
    if why := masks.why_not_kernel(weight.device, weight.dtype):
        return (f"the dropout mask of {eager} by torch's operations, not by Triton's drop: {why}",)
    return (f"the dropout mask of {eager} by Triton's drop",)


def _notes(call: LayerCall, options: CallOptions) -> tuple[str, ...]:
    notes = []
    if call.merged:
        notes.append("merged: the layer runs as a plain linear, and its adapter does not train")
    if call.bypass:
        return (*notes, call.bypass)
    if call.tensors.weight.dim() == 3:
        notes.append(
            f"{call.tensors.weight.shape[0]} experts: bytes are of a row, and a token has a row "
            "for each of its experts"
        )
    if call.quantised:
        notes.append(f"the weight, {call.quantised}, is dequantised for every product")
    if call.tensors.weight.requires_grad:
        notes.append(
            "weight.requires_grad: the layer runs on plain autograd, with what torch saves"
        )
    if call.tensors.magnitude is not None:
        notes += _dora_notes(options)
    return tuple(notes)


def _dora_notes(options: CallOptions) -> list[str]:
    """Return what DoRA's options cost."""
    notes = []
    if options.drops_base:
        notes.append(
            "dropout_on='both': a second base GEMM forward and backward; 'adapter' needs one"
        )
    if options.keep == "output":
        notes.append(
            "keep='output': no in-place op may follow the layer; y costs nothing where its "
            "consumer keeps it too"
        )
    if options.keep == "inner":
        notes.append(
            "keep='inner': z, as large as the output, is saved; 'recompute' trades it for one more "
            "GEMM"
        )
    if options.keep == "recompute":
        notes.append("keep='recompute': one more base GEMM in backward")
    if options.axis == "in":
        notes.append(
            "axis='in': gain⊙x is made in forward and again in backward, on the eager backend"
        )
    return notes

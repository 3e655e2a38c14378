"""Adapted layers as functions of tensors: lorafast.linear, several adapters, and DoRA's norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafast.engine import (
    checks,
    flop_formulas,
    formula,
    host,
    multi_adapter,
    ops,
    philox,
    plain_products,
    reference,
    weight_buffers,
)
from lorafast.engine.grouped.call import grouped_linear
from lorafast.engine.multi_adapter import Factors
from lorafast.engine.precision import activation_dtype
from lorafast.engine.problem import (
    CallOptions,
    LayerTensors,
    Scaling,
    split_scaling,
)
from lorafast.engine.weight_buffers import Loan
from lorafast.engine.weight_norm import NormPolicy
from lorafast.quantised.weight import QuantisedWeight, require_activation

__all__ = ["by_quantised", "grouped_linear", "linear", "row_norm", "several"]

_COMPUTE = NormPolicy()
# axis, dropout_on and keep as linear has them where nothing is asked of DoRA.
_DEFAULT_WORDS = ("out", "adapter", "auto")


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    axis: str = "out",
    out_scale: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout: float = 0.0,
    dropout_on: str = "adapter",
    keep: str = "auto",
    frozen_columns: int = 0,
    seed: torch.Tensor | None = None,
    training: bool = True,
) -> torch.Tensor:
    """Return the output of one adapted linear layer.

    y = gain⊙(x Wᵀ + s·(out_scale⊙(core(drop(x) Aᵀ) Bᵀ) + lora_bias)) + bias, with
    gain = magnitude/norm (1 without a magnitude; for axis="in" it multiplies x instead).

    For backward it keeps x by reference if lora_A trains, h [M,R], and what `keep` says. A weight
    that requires a gradient runs on plain autograd. So does, where calls are not made by C++, a
    LoRA on few tokens of a CPU, at most 2¹⁸ elements of x and y together; with factors wider than x
    or with dropout, at most 2¹⁶, it keeps a copy of x and h in their dtype.

    Args:
        x: activation [...,K], of any strides. fp64, fp32, bf16 or fp16; under autocast it is cast
            once to autocast's dtype.
        weight: frozen weight [N,K] in x's dtype, or a transposed view.
        bias: bias [N], or None.
        lora_A: down projection [R,K]. All factors may have any of the four dtypes; they are cast
            to the activation's for the time of the call.
        lora_B: up projection [N,R].
        core: matrix [R,R] between the two (LaMDA), or its diagonal [R] (VeRA, AdaLoRA).
        magnitude: DoRA's length per output row [N], or per input column [K] for axis="in".
        norm: ‖W+sBA‖ of the same shape; None computes it, detached.
        axis: "out" or "in", the side of the weight that the magnitude scales.
        out_scale: factor [N] on each output of the adapter.
        lora_bias: bias [N] of the up projection.
        scaling: s, a number or a tensor of one element.
        dropout: probability in [0, 1) of dropping an element of the adapter's input.
        dropout_on: "adapter", or "both": DoRA's correction of the base term reads the dropped
            input too, as in PEFT.
        keep: activation kept for d_magnitude: "output", "inner", "recompute" or "auto".
        frozen_columns: number of leading columns of lora_B that get no gradient.
        seed: int64 [1] in [0, 2⁶³), which decides the dropped elements; None draws one from
            torch's generator.
        training: False turns dropout off.

    Returns:
        y [...,N] in the dtype of the call: a fresh tensor, never a view.

    Raises:
        ValueError: a shape, a word or a number does not fit; the message names the argument.
        TypeError: a dtype or a type does not fit; the message names the argument.

    Example:
        x, weight = torch.randn(8, 64), torch.randn(32, 64)
        A, B = torch.randn(4, 64, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        y = lorafast.linear(x, weight, None, A, B, scaling=2.0, dropout=0.1)
        y.sum().backward()

    Source:
        arXiv:2106.09685, arXiv:2402.09353, arXiv:2406.12832
    """
    if type(dropout) is float and (
        dropout == 0 or 0 < round(dropout * philox.STEPS) < philox.STEPS
    ):
        p = dropout if training else 0.0
        if not torch.compiler.is_compiling():
            y = host.linear(
                x, weight, bias, lora_A, lora_B, core, magnitude, norm, out_scale, lora_bias, seed,
                scaling, p, axis, dropout_on, keep, frozen_columns, True,
            )  # fmt: skip
            if y is not None:
                return y
        if (
            core is magnitude is norm is out_scale is None
            and not frozen_columns
            and (axis, dropout_on, keep) == _DEFAULT_WORDS
            and (seed is None or checks.is_seed(seed))
        ):
            y = plain_products.linear(x, weight, bias, lora_A, lora_B, lora_bias, scaling, p, seed)
            if y is not None:
                return y
    tensors = LayerTensors(
        weight, bias, lora_A, lora_B, core, magnitude, norm, out_scale, lora_bias, seed
    )
    options = CallOptions(scaling, dropout, axis, dropout_on, keep, frozen_columns)
    return _linear_checked(x, tensors, options, training)


def _linear_checked(
    x: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    training: bool = True,
    norm_policy: NormPolicy = _COMPUTE,
    loan: Loan | None = None,
) -> torch.Tensor:
    """linear of tensors and options as objects. options.scaling may be a tensor, keep "auto".

    loan: from which backward takes tensors.weight again; without one the weight is saved.
    """
    dtype = checks.call(x, tensors, options)
    scaling, p, axis, dropout_on, keep, frozen_columns = options
    seed, scale, grad = tensors.seed, None, torch.is_grad_enabled()
    p = float(p) if training else 0.0
    if p == 0:
        seed = None
    elif seed is None:
        seed = philox.draw_seed(x.device)
    if type(scaling) is not float:
        scaling, scale = split_scaling(scaling)
    weight, magnitude, norm = tensors.weight, tensors.magnitude, tensors.norm
    if grad and (weight.requires_grad or (scale is not None and scale.requires_grad)):
        if loan is not None:
            # Plain autograd saves it.
            weight = weight.clone()
            tensors = tensors._replace(weight=weight)
        if magnitude is not None and norm is None:
            tensors = tensors._replace(norm=_trained_norm(tensors, options, scale, norm_policy))
        return reference.linear(
            x, *tensors[:7], axis, tensors.out_scale, tensors.lora_bias, options.scaling, p,
            dropout_on, keep, frozen_columns, seed,
        )  # fmt: skip
    if seed is not tensors.seed or scale is not tensors.scale:
        tensors = LayerTensors(*tensors[:-2], seed, scale)
    kept = "none"
    if magnitude is not None:
        if norm is None:
            factors = _norm_factors(tensors, scale)
            norm = ops.row_norm(factors, CallOptions(scaling, 0.0, axis), norm_policy)
            tensors = LayerTensors(*tensors[:6], norm, *tensors[7:])
            # One that is computed and detached is the host path's own, which has refused the call.
            if norm_policy != _COMPUTE:
                y = _by_host(x, tensors, options, scaling, p)
                if y is not None:
                    return y
        if grad and (magnitude.requires_grad or norm.requires_grad):
            has_bias = tensors.bias is not None or tensors.lora_bias is not None
            options = CallOptions(scaling, p, axis, dropout_on)
            kept = formula.resolve_keep(keep, options, True, has_bias, dtype)
    if x.dtype != dtype:
        x = x.to(dtype)
    options = CallOptions(scaling, p, axis, dropout_on, kept, frozen_columns)
    return ops.linear(x, tensors, options, loan)


def by_quantised(
    x: torch.Tensor, quantised: QuantisedWeight, tensors: LayerTensors, options: CallOptions
) -> torch.Tensor:
    """Return y [...,N] beside a quantised weight, which is dequantised here and in backward.

    Args:
        x: activation [...,K]; fp32, bf16 or fp16.
        quantised: what gives W. Autograd keeps what it keeps beside a dense weight.
        tensors: the other tensors of the call; their weight is ignored.
        options: the options; dropout is that of this call.

    Returns:
        y in x's dtype, or autocast's.

    Raises:
        ValueError, TypeError: as linear; and where x is fp64.

    Example:
        import bitsandbytes
        from lorafast.engine.problem import CallOptions, LayerTensors
        from lorafast.quantised import formats
        layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False).to("cpu")
        tensors = LayerTensors(None, lora_A=torch.randn(4, 64), lora_B=torch.randn(32, 4))
        x, weight = torch.randn(2, 64), formats.of(layer)
        y = lorafast.functional.by_quantised(x, weight, tensors, CallOptions(keep="auto"))
    """
    called_in = activation_dtype(x)
    # Autocast's, else the one that the module is told to compute in, else x's.
    dtype = called_in if called_in != x.dtype else quantised.compute_dtype or called_in
    require_activation(x, dtype)
    if called_in == x.dtype != dtype:
        x = x.to(dtype)
    # Where an observer could keep W, it is a fresh tensor that backward reads.
    loan = None if weight_buffers.is_observed() else Loan(quantised, dtype)
    with weight_buffers.borrow(quantised, dtype) as weight:
        tensors, y = tensors._replace(weight=weight), None
        if loan is not None:
            *given, _ = tensors
            scaling, p, axis, dropout_on, keep, frozen_columns = options
            y = host.linear(
                x, *given, scaling, p, axis, dropout_on, keep, frozen_columns, True, loan
            )  # fmt: skip
        if y is None:
            y = _linear_checked(x, tensors, options, loan=loan)
    return y if y.dtype == called_in else y.to(called_in)


def _by_host(
    x: torch.Tensor, tensors: LayerTensors, options: CallOptions, scaling: float, p: float
) -> torch.Tensor | None:
    """The output by the host path, for a norm that it does not compute itself; None: not served."""
    *given, scale = tensors
    if scale is not None or torch.compiler.is_compiling():
        return None
    _, _, axis, dropout_on, keep, frozen_columns = options
    return host.linear(x, *given, scaling, p, axis, dropout_on, keep, frozen_columns, False)


def several(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[Factors],
    training: bool = True,
) -> torch.Tensor:
    """Return y = x Wᵀ + Σᵢ sᵢ(dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ) + bias: LoRA adapters on one weight.

    For backward it keeps x by reference if an A trains, and h [M,Rᵢ] for every B that trains.

    Args:
        x: activation [...,K], as in linear.
        weight: frozen weight [N,K].
        bias: bias [N], or None.
        adapters: at least one Factors, each with a rank, scaling and dropout of its own. One that
            drops without a seed gets one, in their order.
        training: False turns dropout off.

    Returns:
        y [...,N] in the dtype of the call: a fresh tensor.

    Raises:
        ValueError, TypeError: as linear; and where the weight or a tensor scaling trains.

    Example:
        from lorafast.engine.multi_adapter import Factors
        x, weight = torch.randn(3, 6), torch.randn(5, 6)
        pairs = [Factors(torch.randn(2, 6), torch.randn(5, 2)) for _ in range(2)]
        y = lorafast.functional.several(x, weight, None, pairs)
    """
    if not adapters:
        shape = tuple(weight.shape)
        raise ValueError(f"adapters is empty; weight {shape} alone is torch.nn.functional.linear")
    ready = []
    for adapter in adapters:
        A, B, lora_bias, seed, _, _, dropout = adapter
        tensors = LayerTensors(weight, bias, A, B, lora_bias=lora_bias, seed=seed)
        checks.call(x, tensors, CallOptions(adapter.s, dropout, keep="auto"))
        p = float(dropout) if training else 0.0
        seed = (philox.draw_seed(x.device) if seed is None else seed) if p else None
        scaling, scale = split_scaling(adapter.s)
        ready.append(Factors(A, B, lora_bias, seed, scale, scaling, p))
    scales = [adapter.scale for adapter in ready if adapter.scale is not None]
    trained = weight.requires_grad or any(scale.requires_grad for scale in scales)
    if trained and torch.is_grad_enabled():
        raise ValueError(
            f"weight {tuple(weight.shape)} and tensor scalings must be frozen "
            "where several adapters share a call"
        )
    return multi_adapter.several(x.to(activation_dtype(x)), weight, bias, ready)


def row_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    axis: str = "out",
    detach: bool = True,
    cache: bool = False,
) -> torch.Tensor:
    """Return ‖W + s·(out_scale⊙B)·core·A‖ per row or per column: DoRA's norm.

    Args:
        weight: weight [N,K].
        lora_A: down projection [R,K].
        lora_B: up projection [N,R].
        core: matrix [R,R] or diagonal [R] between them, or None.
        out_scale: factor [N] on each output of the adapter, or None.
        scaling: s, a number or a tensor of one element.
        axis: "out" for rows, "in" for columns.
        detach: True gives no gradient (arXiv:2402.09353 §4.3), False the exact one.
        cache: True gives the last result again until a tensor is replaced, a write raises its
            version counter, or a torch.optim.Optimizer makes a step. Other writes (through `.data`,
            a storage, dlpack or torch.distributed) are not noticed. Ignored while torch.compile
            traces, in inference mode, and while a CUDA graph is captured.

    Returns:
        The norm, [N] or [K], in fp32, or in fp64 for an fp64 weight: a fresh tensor.

    Raises:
        ValueError, TypeError: as linear.

    Example:
        weight, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.zeros(5, 2)
        norm = lorafast.functional.row_norm(weight, A, B)

    Source:
        arXiv:2402.09353
    """
    tensors = LayerTensors(weight, None, lora_A, lora_B, core, out_scale=out_scale)
    checks.norm(tensors, axis)
    number, scale = split_scaling(scaling)
    policy = NormPolicy(detach, cache and not torch.compiler.is_compiling())
    tensors, options = tensors._replace(scale=scale), CallOptions(number, 0.0, axis)
    trained = weight.requires_grad or (scale is not None and scale.requires_grad)
    if not detach and torch.is_grad_enabled() and trained:
        return _exact_norm(tensors, options)
    return ops.row_norm(tensors, options, policy)


def _trained_norm(
    tensors: LayerTensors, options: CallOptions, scale: torch.Tensor | None, policy: NormPolicy
) -> torch.Tensor:
    """The norm of a layer whose weight or tensor scaling trains."""
    if not policy.detach:
        return _exact_norm(tensors, options)
    number = 1.0 if scale is not None else float(options.scaling)
    factors = _norm_factors(tensors, scale)
    return ops.row_norm(factors, CallOptions(number, 0.0, options.axis), policy)


def _norm_factors(tensors: LayerTensors, scale: torch.Tensor | None) -> LayerTensors:
    """The tensors that the norm depends on, and no other."""
    weight, _, A, B, core, *_ = tensors
    return LayerTensors(weight, None, A, B, core, None, None, tensors.out_scale, None, None, scale)


def _exact_norm(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    """The norm on plain autograd, for a weight or a tensor scaling that trains."""
    scaling = options.scaling if tensors.scale is None else tensors.scale
    return reference.row_norm(
        tensors.weight, tensors.lora_A, tensors.lora_B, tensors.core, tensors.out_scale, scaling,
        options.axis,
    )  # fmt: skip


# The ops are all defined here.
flop_formulas.install()

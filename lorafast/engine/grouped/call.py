"""lorafast.grouped_linear: an adapted layer of experts as a function of tensors."""

from __future__ import annotations

import torch

from lorafast.engine import formula, philox, reference
from lorafast.engine.grouped import checks, ops
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling, split_scaling


def grouped_linear(
    x: torch.Tensor,
    offsets: torch.Tensor,
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
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of an adapted linear layer of experts, each on its own rows of x.

    Row i of the result is lorafast.linear's of row i with the tensors of its expert e:
    y = gain_e⊙(x W_eᵀ + s·(out_scale_e⊙(core_e(drop(x) A_eᵀ) B_eᵀ) + lora_bias_e)) + bias_e.
    Nothing of the size of the weight is written. For backward it keeps what lorafast.linear keeps:
    x by reference if lora_A trains, h [S,R], and what `keep` says. An expert without rows gets
    gradients of zero. On a GPU the host reads no offset where torch's grouped product serves.

    Args:
        x: activation [S,K], its rows sorted by expert. Under autocast it is cast once.
        offsets: int32 [E+1]: the rows of expert e are offsets[e] to offsets[e+1].
        weight: frozen weights [E,N,K] in x's dtype, or a transposed view of [E,K,N].
        bias: biases [E,N], or None.
        lora_A: down projections [E,R,K], or one [R,K] that all experts share.
        lora_B: up projections [E,N,R], or one [N,R] that all experts share.
        core: matrices [E,R,R] between the two, or their diagonals [E,R].
        magnitude: DoRA's length per output row [E,N].
        norm: ‖W+sBA‖ [E,N]; None computes it, detached.
        axis: "out"; the "in" of lorafast.linear is not offered for experts.
        out_scale: factors [E,N] on the outputs of the adapter.
        lora_bias: biases [E,N] of the up projections.
        scaling: s, a number or a tensor of one element.
        dropout: probability in [0, 1) of dropping an element of the adapter's input.
        dropout_on: "adapter" or "both", as in lorafast.linear.
        keep: activation kept for d_magnitude, as in lorafast.linear.
        frozen_columns: number of leading columns of lora_B that get no gradient.
        seed: int64 [1] in [0, 2⁶³), which decides the dropped elements; None draws one.
        training: False turns dropout off.
        rows: int64 [S], the index of each row in the activation before it was sorted, such as
            token·top_k + slot. The dropped elements of a row depend on the seed and this index
            alone, so that neither the order of experts nor their distribution over processes
            changes a mask. None: a row's index is its place in x.

    Returns:
        y [S,N] in the dtype of the call: a fresh tensor.

    Raises:
        ValueError: a shape, a word or a number does not fit; the message names the argument.
        TypeError: a dtype or a type does not fit; the message names the argument.

    Example:
        x, weight = torch.randn(7, 16), torch.randn(3, 8, 16)
        offsets = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
        A, B = torch.randn(3, 2, 16, requires_grad=True), torch.zeros(3, 8, 2, requires_grad=True)
        y = lorafast.grouped_linear(x, offsets, weight, None, A, B, scaling=2.0)
        y.sum().backward()

    Source:
        arXiv:2106.09685, arXiv:2402.09353
    """
    tensors = LayerTensors(
        weight, bias, lora_A, lora_B, core, magnitude, norm, out_scale, lora_bias, seed
    )
    options = CallOptions(scaling, dropout, axis, dropout_on, keep, frozen_columns)
    return grouped_linear_checked(x, Groups(offsets, rows), tensors, options, training)


def grouped_linear_checked(
    x: torch.Tensor,
    groups: Groups,
    tensors: LayerTensors,
    options: CallOptions,
    training: bool = True,
    detach_norm: bool = True,
) -> torch.Tensor:
    """Return grouped_linear of tensors and options as objects."""
    dtype = checks.call(x, groups, tensors, options)
    groups = Groups(*(part if part is None else part.contiguous() for part in groups))
    p = float(options.dropout) if training else 0.0
    seed = (philox.draw_seed(x.device) if tensors.seed is None else tensors.seed) if p else None
    scaling, scale = split_scaling(options.scaling)
    weight, magnitude = tensors.weight, tensors.magnitude
    grad = torch.is_grad_enabled()
    trained = weight.requires_grad or (scale is not None and scale.requires_grad)
    if grad and (trained or (magnitude is not None and tensors.norm is None and not detach_norm)):
        return reference.grouped_linear(
            x, groups.offsets, *tensors[:7], options.axis, tensors.out_scale, tensors.lora_bias,
            options.scaling, p, options.dropout_on, options.keep, options.frozen_columns, seed,
            rows=groups.rows, detach_norm=detach_norm,
        )  # fmt: skip
    tensors, kept = tensors._replace(seed=seed, scale=scale), "none"
    if magnitude is not None:
        if tensors.norm is None:
            tensors = tensors._replace(norm=ops.row_norm(tensors, scaling))
        if grad and (magnitude.requires_grad or tensors.norm.requires_grad):
            has_bias = tensors.bias is not None or tensors.lora_bias is not None
            resolved = CallOptions(scaling, p, options.axis, options.dropout_on)
            kept = formula.resolve_keep(options.keep, resolved, True, has_bias, dtype)
    options = options._replace(scaling=scaling, dropout=p, keep=kept)
    return ops.grouped_linear(x.to(dtype), groups, tensors, options)

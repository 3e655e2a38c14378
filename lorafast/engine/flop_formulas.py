"""The flops of lorafast's ops for torch.utils.flop_counter, which sees an op as one node.

As in torch's own formulas, matrix products count 2 per multiply-add and everything else counts
nothing: the count of an adapted layer is that of the same formula written in torch ops. Products
that a kernel computes again in backward count only for DoRA's keep="recompute".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.runtime.import_hooks import after_import

_T, _O = len(LayerTensors._fields), len(CallOptions._fields)

Shape = Sequence[int]


def linear(x: Shape, *flat, out_shape: object = None) -> int:
    """Return the flops of lorafast::linear from the shapes of its arguments."""
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T:])
    (N, K), M, R = tensors.weight, math.prod(x[:-1]), tensors.lora_A[0]
    # With dropout on both, the base product of drop(x) corrects that of x.
    base = 2 if _corrects_base(tensors, options) else 1
    return 2 * M * (base * N * K + R * (N + K)) + _core(tensors, M)


def linear_backward(
    dy: Shape, x: Shape | None, h: Shape | None, kept: Shape | None, *flat, out_shape: object = None
) -> int:
    """Return the flops of lorafast::linear_backward from the shapes of its arguments."""
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _O])
    needs = GradMask(*flat[-1])
    (N, K), M, R = tensors.weight, math.prod(dy[:-1]), tensors.lora_A[0]
    in_axis_gain = needs.gain and options.axis == "in"
    needs_dx = needs.x or in_axis_gain
    needs_v = needs_dx or needs.lora_A
    products = 0
    if needs_v or needs.core:  # u = dy B
        products += M * N * R
    if needs.lora_B or needs.out_scale:  # P = dyᵀ h', from which dB and d_out_scale follow
        products += M * N * (R - options.frozen_columns)
    if needs_dx:
        products += M * K * (R + N * (2 if _corrects_base(tensors, options) else 1))
    if needs.lora_A:
        products += M * K * R
    if needs.gain and options.axis == "out" and options.keep == "recompute":
        products += M * N * (K + R)
    return 2 * products + (needs_v + needs.core) * _core(tensors, M)


def row_norm(*flat, out_shape: object = None) -> int:
    """Return the flops of lorafast::row_norm, which is the product of B·core and A."""
    tensors = LayerTensors(*flat[:_T])
    N, K = tensors.weight
    return 2 * N * K * tensors.lora_A[0] + _core(tensors, N)


def row_norm_backward(d_norm: Shape, value: Shape, *flat, out_shape: object = None) -> int:
    """Return the flops of lorafast::row_norm_backward from the shapes of its arguments."""
    tensors, needs = LayerTensors(*flat[:_T]), GradMask(*flat[-1])
    (N, K), R = tensors.weight, tensors.lora_A[0]
    through_B = needs.lora_B or needs.core or needs.out_scale
    through_core = (needs.lora_B or needs.out_scale) + needs.core
    return 2 * N * K * R * (needs.lora_A + through_B) + through_core * _core(tensors, N)


def several(x: Shape, weight: Shape, bias: Shape | None, *lists, out_shape: object = None) -> int:
    """Return the flops of lorafast::several from the shapes of its arguments."""
    (N, K), M, ranks = weight, math.prod(x[:-1]), sum(A[0] for A in lists[0])
    return 2 * M * (N * K + ranks * (N + K))


def several_backward(
    dy: Shape, x: Shape | None, hs: list, weight: Shape, *rest, out_shape: object = None
) -> int:
    """Return the flops of lorafast::several_backward from the shapes of its arguments."""
    *lists, wants = rest
    (N, K), M = weight, math.prod(dy[:-1])
    needs_x, _, *flat = wants
    products = M * N * K * needs_x
    for index, A in enumerate(lists[0]):
        needs_A, needs_B, _ = flat[3 * index : 3 * index + 3]
        per_output = (needs_x or needs_A) + needs_B  # u and dB
        products += M * A[0] * (N * per_output + K * (needs_x + needs_A))
    return 2 * products


def grouped_linear(
    x: Shape, offsets: Shape, rows: Shape | None, *flat, out_shape: object = None
) -> int:
    """Return the flops of lorafast::grouped_linear: a layer's, as each row has one expert."""
    return linear(x, *_of_expert(flat))


def grouped_linear_backward(
    dy: Shape,
    x: Shape | None,
    h: Shape | None,
    kept: Shape | None,
    offsets: Shape,
    rows: Shape | None,
    *flat,
    out_shape: object = None,
) -> int:
    """Return the flops of lorafast::grouped_linear_backward from the shapes of its arguments."""
    return linear_backward(dy, x, h, kept, *_of_expert(flat))


def grouped_row_norm(
    weight: Shape, A: Shape, B: Shape, core: Shape | None, *_, out_shape: object = None
) -> int:
    """Return the flops of lorafast::grouped_row_norm, those of row_norm for each expert."""
    others = [None] * (_T - 5)
    return weight[0] * row_norm(*_of_expert([weight, None, A, B, core, *others]))


def _of_expert(flat: Sequence) -> list:
    """The arguments of a layer's op: the shapes of one expert's tensors."""
    own = {"weight": 3, "lora_A": 3, "lora_B": 3, "core": 2}
    tensors = [
        shape if shape is None or len(shape) < own.get(name, 2) else shape[1:]
        for name, shape in zip(LayerTensors._fields, flat[:_T], strict=True)
    ]
    return [*tensors, *flat[_T:]]


def _corrects_base(tensors: LayerTensors, options: CallOptions) -> bool:
    return tensors.magnitude is not None and options.axis == "out" and options.drops_base


def _core(tensors: LayerTensors, rows: int) -> int:
    """The flops of one product of [rows,R] with the core; a diagonal one is no matrix product."""
    is_matrix = tensors.core is not None and len(tensors.core) == 2
    return 2 * rows * int(tensors.core[0]) ** 2 if is_matrix else 0


FORMULAS: dict[str, Callable[..., int]] = {
    "linear": linear,
    "linear_backward": linear_backward,
    "row_norm": row_norm,
    "row_norm_backward": row_norm_backward,
    "several": several,
    "several_backward": several_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "grouped_row_norm": grouped_row_norm,
}


def install() -> None:
    """Register the formulas now or, if torch's counter is not imported yet, when it is.

    Importing it here would import Triton.
    """
    after_import("torch.utils.flop_counter", _register)


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.lorafast, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)

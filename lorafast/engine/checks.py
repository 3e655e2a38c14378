"""The one place where arguments are checked: every refusal names the argument and the shapes it met."""

from __future__ import annotations

import math

import torch

from lorafast.engine import philox
from lorafast.engine.problem import LayerTensors, Scaling, activation_dtype

AXES = ("out", "in")
DROPOUT_ON = ("adapter", "both")
KEEPS = ("auto", "output", "inner", "recompute")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (int, float)
# Calls that were found right, and the dtypes they run in. So many are kept, and then forgotten together.
_passed: dict[tuple | None, torch.dtype] = {}
_KEPT = 4096


def call(
    x: torch.Tensor,
    t: LayerTensors,
    scaling: Scaling,
    dropout: float,
    axis: str,
    dropout_on: str,
    keep: str,
    frozen_columns: int,
    signature: tuple | None = None,
) -> torch.dtype:
    """Everything lorafast.linear is given; the dtype it runs in.

    signature: onlookers.signature(x, *t). What has passed once need not be looked at again: only the scaling is no part of it.
    """
    seen = None
    if signature and type(scaling) in _NUMBERS and scaling - scaling == 0:
        seen = _seen(signature, x, dropout, axis, dropout_on, keep, frozen_columns)
        if (runs_in := _passed.get(seen)) is not None:
            return runs_in
    words(axis, dropout_on, keep, dropout)
    floating("x", x)
    tensors = t._asdict()
    N, K, R = factors(t, axis)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x {tuple(x.shape)} must end in K={K} for weight {(N, K)}")
    _seed(tensors["seed"], x)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is on {tensor.device}, x {tuple(x.shape)} on {x.device}"
            )
    if tensors["norm"] is not None and tensors["magnitude"] is None:
        raise ValueError(f"norm {tuple(tensors['norm'].shape)} is given without magnitude")
    runs_in = activation_dtype(x)
    if not _fits(t.weight, x, runs_in):
        both = (
            f"weight {tuple(t.weight.shape)} is {t.weight.dtype}, x {tuple(x.shape)} is {x.dtype}"
        )
        raise TypeError(f"{both}: without autocast they must be equal")
    _scaling(scaling, x)
    # A symbolic integer, which torch.compile may pass, is no int but compares like one.
    if not isinstance(frozen_columns, int | torch.SymInt) or not 0 <= frozen_columns <= R:
        raise ValueError(
            f"frozen_columns {frozen_columns!r} must be an integer between 0 and R={R}, lora_B {(N, R)}"
        )
    _remember(seen, runs_in)
    return runs_in


def norm(t: LayerTensors, axis: str, signature: tuple | None = None) -> None:
    """Everything lorafast.functional.row_norm is given but its scaling. signature: onlookers.signature(*t), as in call."""
    # The weight comes first among the tensors, and of the first a signature has the width alone.
    seen = (signature, t.weight.shape, axis) if signature and type(axis) is str else None
    if seen is None or seen not in _passed:
        word("axis", axis, AXES)
        factors(t, axis)
        _remember(seen, t.weight.dtype)


def factors(t: LayerTensors, axis: str) -> tuple[int, int, int]:
    """The weight and every tensor whose shape it decides; N, K and R."""
    tensors = t._asdict()
    pair("weight", tensors["weight"], "[N, K]")
    N, K = tensors["weight"].shape
    for name in ("lora_A", "lora_B"):
        if tensors[name] is None:
            raise TypeError(
                f"{name} is None; a layer without an adapter is torch.nn.functional.linear"
            )
        pair(name, tensors[name], "[R, K]" if name == "lora_A" else "[N, R]")
    R = tensors["lora_A"].shape[0]
    if tensors["lora_A"].shape[1] != K or R == 0:
        raise ValueError(
            f"lora_A {tuple(tensors['lora_A'].shape)} must be [R>0, K={K}] for weight {(N, K)}"
        )
    gains = K if axis == "in" else N
    wanted = {
        "lora_B": [(N, R)],
        "core": [(R, R), (R,)],
        "bias": [(N,)],
        "out_scale": [(N,)],
        "lora_bias": [(N,)],
    }
    wanted |= {"magnitude": [(gains,)], "norm": [(gains,)]}
    for name, shapes in wanted.items():
        if tensors[name] is not None:
            shaped(name, tensors[name], shapes, (N, K), R)
    return N, K, R


def words(axis: str, dropout_on: str, keep: str, dropout: float) -> None:
    """The words of DoRA, alone and together."""
    word("axis", axis, AXES)
    word("dropout_on", dropout_on, DROPOUT_ON)
    word("keep", keep, KEEPS)
    probability(dropout)
    if keep == "output" and dropout > 0 and dropout_on == "both":
        raise ValueError(
            "keep='output' cannot serve dropout_on='both', whose output is no multiple of z; use keep='inner'"
        )
    if axis == "in" and keep in ("output", "inner"):
        raise ValueError(
            f"keep={keep!r} belongs to axis='out'; axis='in' remakes gain⊙x in backward and keeps nothing more"
        )


def word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def probability(dropout: float) -> None:
    """dropout in [0, 1), and distinguishable from 0 and 1 in 16 bits."""
    if not isinstance(dropout, int | float):
        raise TypeError(
            f"dropout {dropout!r} must be a number in [0, 1), not {type(dropout).__name__}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be in [0, 1)")
    philox.threshold(dropout)


def whole(name: str, value: int, least: int = 1) -> None:
    """An integer of at least `least`, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def number(name: str, value: float, below: float = math.inf) -> None:
    """A number in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        raise ValueError(f"{name}={value!r} must be a number in [0, {below})")


def floating(name: str, tensor: torch.Tensor) -> None:
    """A tensor of fp64, fp32, bf16 or fp16."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} {tuple(tensor.shape)} is {tensor.dtype}; lorafast computes in float64, float32, bfloat16 and float16"
        )


def pair(name: str, tensor: torch.Tensor, form: str) -> None:
    """A floating matrix."""
    floating(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {form}")


def shaped(
    name: str, tensor: torch.Tensor, shapes: list[tuple[int, ...]], weight: tuple[int, int], R: int
) -> None:
    """A floating tensor of one of the given shapes."""
    floating(name, tensor)
    if tuple(tensor.shape) not in shapes:
        forms = " or ".join(map(str, map(tuple, shapes)))
        raise ValueError(
            f"{name} {tuple(tensor.shape)} must be {forms} for weight {weight} and rank {R}"
        )


def _seen(
    signature: tuple,
    x: torch.Tensor,
    dropout: float,
    axis: str,
    dropout_on: str,
    keep: str,
    frozen_columns: int,
) -> tuple | None:
    """All that decides whether a call is right, its scaling left out; None where 1, 1.0 and True would be taken for one another."""
    words = type(axis) is str and type(dropout_on) is str and type(keep) is str
    if not words or type(dropout) not in _NUMBERS or type(frozen_columns) is not int:
        return None
    device = "cpu" if x.is_cpu else "cuda"
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return signature, cast, dropout, axis, dropout_on, keep, frozen_columns


def _remember(seen: tuple | None, runs_in: torch.dtype) -> None:
    if seen is None:
        return
    if len(_passed) >= _KEPT:
        _passed.clear()
    _passed[seen] = runs_in


def _seed(seed: torch.Tensor | None, x: torch.Tensor) -> None:
    if seed is not None and not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be an int64 tensor of shape (1,), not {seed!r}")
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (1,)):
        raise TypeError(
            f"seed {tuple(seed.shape)} {seed.dtype} must be (1,) int64, in [0, 2**63), for x {tuple(x.shape)}"
        )


def _scaling(scaling: Scaling, x: torch.Tensor) -> None:
    if isinstance(scaling, torch.Tensor):
        floating("scaling", scaling)
        if scaling.numel() != 1:
            raise ValueError(
                f"scaling {tuple(scaling.shape)} must be a number or a tensor of one element"
            )
        if scaling.device != x.device:
            raise ValueError(
                f"scaling {tuple(scaling.shape)} is on {scaling.device}, x {tuple(x.shape)} on {x.device}"
            )
    elif (
        isinstance(scaling, float) and scaling - scaling != 0
    ):  # inf and nan; torch.compile traces no math.isfinite
        raise ValueError(f"scaling {scaling} must be finite")
    elif not isinstance(scaling, int | float | torch.SymFloat):
        raise TypeError(f"scaling must be a number or a tensor of one element, not {scaling!r}")


def _fits(weight: torch.Tensor, x: torch.Tensor, runs_in: torch.dtype) -> bool:
    """Whether the weight has the dtype of the call, or autocast brings the two together."""
    if weight.dtype == runs_in:
        return True
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return cast and torch.float64 not in (weight.dtype, runs_in)

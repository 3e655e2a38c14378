"""The one place where arguments are checked: every refusal names the argument and the shapes it met."""

from __future__ import annotations

import torch

from lorafast import philox
from lorafast.problem import Scaling, Tensors, activation_dtype

AXES = ("out", "in")
DROPOUT_ON = ("adapter", "both")
KEEPS = ("auto", "output", "inner", "recompute")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (int, float)


def call(
    x: torch.Tensor,
    t: Tensors,
    scaling: Scaling,
    dropout: float,
    axis: str,
    dropout_on: str,
    keep: str,
    frozen_columns: int,
    plain: bool = False,
) -> torch.dtype:
    """Everything lorafast.linear is given; the dtype it runs in. plain: onlookers.plain of the tensors; then a glance may do."""
    if plain and _right_numbers(scaling, dropout, frozen_columns) and _right_words(axis, dropout_on, keep, dropout):
        runs_in = activation_dtype(x)
        if _right_tensors(x, t, frozen_columns, axis) and _fits(t.weight, x, runs_in):
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
            raise ValueError(f"{name} {tuple(tensor.shape)} is on {tensor.device}, x {tuple(x.shape)} on {x.device}")
    if tensors["norm"] is not None and tensors["magnitude"] is None:
        raise ValueError(f"norm {tuple(tensors['norm'].shape)} is given without magnitude")
    runs_in = activation_dtype(x)
    if not _fits(t.weight, x, runs_in):
        both = f"weight {tuple(t.weight.shape)} is {t.weight.dtype}, x {tuple(x.shape)} is {x.dtype}"
        raise TypeError(f"{both}: without autocast they must be equal")
    _scaling(scaling, x)
    # A symbolic integer, which torch.compile may pass, is no int but compares like one.
    if not isinstance(frozen_columns, int | torch.SymInt) or not 0 <= frozen_columns <= R:
        raise ValueError(f"frozen_columns {frozen_columns!r} must be an integer between 0 and R={R}, lora_B {(N, R)}")
    return runs_in


def factors(t: Tensors, axis: str, plain: bool = False) -> tuple[int, int, int]:
    """The weight and every tensor whose shape it decides; N, K and R. plain: as in call."""
    if plain and _right_factors(t, axis):
        return *t.weight.shape, t.lora_A.shape[0]
    tensors = t._asdict()
    pair("weight", tensors["weight"], "[N, K]")
    N, K = tensors["weight"].shape
    for name in ("lora_A", "lora_B"):
        if tensors[name] is None:
            raise TypeError(f"{name} is None; a layer without an adapter is torch.nn.functional.linear")
        pair(name, tensors[name], "[R, K]" if name == "lora_A" else "[N, R]")
    R = tensors["lora_A"].shape[0]
    if tensors["lora_A"].shape[1] != K or R == 0:
        raise ValueError(f"lora_A {tuple(tensors['lora_A'].shape)} must be [R>0, K={K}] for weight {(N, K)}")
    gains = K if axis == "in" else N
    wanted = {"lora_B": [(N, R)], "core": [(R, R), (R,)], "bias": [(N,)], "out_scale": [(N,)], "lora_bias": [(N,)]}
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
        raise ValueError("keep='output' cannot serve dropout_on='both', whose output is no multiple of z; use keep='inner'")
    if axis == "in" and keep in ("output", "inner"):
        raise ValueError(f"keep={keep!r} belongs to axis='out'; axis='in' remakes gain⊙x in backward and keeps nothing more")


def word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def probability(dropout: float) -> None:
    """dropout in [0, 1), and distinguishable from 0 and 1 in 16 bits."""
    if not isinstance(dropout, int | float):
        raise TypeError(f"dropout {dropout!r} must be a number in [0, 1), not {type(dropout).__name__}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be in [0, 1)")
    philox.threshold(dropout)


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


def shaped(name: str, tensor: torch.Tensor, shapes: list[tuple[int, ...]], weight: tuple[int, int], R: int) -> None:
    """A floating tensor of one of the given shapes."""
    floating(name, tensor)
    if tuple(tensor.shape) not in shapes:
        forms = " or ".join(map(str, map(tuple, shapes)))
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {forms} for weight {weight} and rank {R}")


# The glances: asked at every call, so they are quick. What they let pass is right; of the rest they know nothing.


def _right_numbers(scaling: Scaling, dropout: float, frozen_columns: int) -> bool:
    if type(scaling) not in _NUMBERS or scaling - scaling != 0 or type(frozen_columns) is not int or type(dropout) not in _NUMBERS:
        return False
    return dropout == 0 or (0 < dropout < 1 and 0 < round(dropout * philox.STEPS) < philox.STEPS)


def _right_words(axis: str, dropout_on: str, keep: str, dropout: float) -> bool:
    if axis == "out":
        return dropout_on in DROPOUT_ON and keep in KEEPS and (keep != "output" or dropout == 0 or dropout_on == "adapter")
    return axis == "in" and dropout_on in DROPOUT_ON and keep in ("auto", "recompute")


def _right_tensors(x: torch.Tensor, t: Tensors, frozen_columns: int, axis: str) -> bool:
    if not _right_factors(t, axis):
        return False
    shape, (R, K) = x.shape, t.lora_A.shape
    return (
        x.dtype in DTYPES
        and len(shape) > 0
        and shape[-1] == K
        and 0 <= frozen_columns <= R
        and (t.norm is None or t.magnitude is not None)
        and (t.seed is None or (t.seed.dtype == torch.int64 and t.seed.shape == (1,)))
    )


def _right_factors(t: Tensors, axis: str) -> bool:
    weight, bias, A, B, core, magnitude, norm, out_scale, lora_bias, _, _ = t
    if weight is None or A is None or B is None or weight.dim() != 2 or A.dim() != 2:
        return False
    (N, K), (R, columns) = weight.shape, A.shape
    if R == 0 or columns != K or B.shape != (N, R) or not (weight.dtype in DTYPES and A.dtype in DTYPES and B.dtype in DTYPES):
        return False
    if bias is not None and (bias.shape != (N,) or bias.dtype not in DTYPES):
        return False
    if core is not None and ((core.shape != (R, R) and core.shape != (R,)) or core.dtype not in DTYPES):
        return False
    if magnitude is None and norm is None and out_scale is None and lora_bias is None:
        return True
    gains = K if axis == "in" else N
    wanted = ((magnitude, gains), (norm, gains), (out_scale, N), (lora_bias, N))
    return all(one is None or (one.shape == (size,) and one.dtype in DTYPES) for one, size in wanted)


def _seed(seed: torch.Tensor | None, x: torch.Tensor) -> None:
    if seed is not None and not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be an int64 tensor of shape (1,), not {seed!r}")
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (1,)):
        raise TypeError(f"seed {tuple(seed.shape)} {seed.dtype} must be (1,) int64, in [0, 2**63), for x {tuple(x.shape)}")


def _scaling(scaling: Scaling, x: torch.Tensor) -> None:
    if isinstance(scaling, torch.Tensor):
        floating("scaling", scaling)
        if scaling.numel() != 1:
            raise ValueError(f"scaling {tuple(scaling.shape)} must be a number or a tensor of one element")
        if scaling.device != x.device:
            raise ValueError(f"scaling {tuple(scaling.shape)} is on {scaling.device}, x {tuple(x.shape)} on {x.device}")
    elif isinstance(scaling, float) and scaling - scaling != 0:  # inf and nan; torch.compile traces no math.isfinite
        raise ValueError(f"scaling {scaling} must be finite")
    elif not isinstance(scaling, int | float | torch.SymFloat):
        raise TypeError(f"scaling must be a number or a tensor of one element, not {scaling!r}")


def _fits(weight: torch.Tensor, x: torch.Tensor, runs_in: torch.dtype) -> bool:
    """Whether the weight has the dtype of the call, or autocast brings the two together."""
    if weight.dtype == runs_in:
        return True
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return cast and torch.float64 not in (weight.dtype, runs_in)

"""The one place where arguments are checked: every error names the argument and the shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from lorafast.engine import philox
from lorafast.engine.precision import activation_dtype
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling
from lorafast.runtime import torch_internals
from lorafast.runtime.name_hints import nearest

AXES = ("out", "in")
DROPOUT_ON = ("adapter", "both")
KEEPS = ("auto", "output", "inner", "recompute")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = frozenset(DTYPES)


def call(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> torch.dtype:
    """Check everything that lorafast.linear is given; return the dtype it computes in.

    options.scaling may be a tensor here, and options.keep "auto". A usual call is recognised at
    once; every other one goes through the checks that name what is wrong.
    """
    weight, bias, A, B, core, magnitude, norm, out_scale, lora_bias, seed, _ = tensors
    scaling, p, axis, dropout_on, keep, frozen_columns = options
    # Written out and without a loop, because it runs at every call of a layer.
    try:
        (N, K), R, device = weight.shape, A.shape[0], x.device
        dtype = activation_dtype(x) if torch_internals.any_autocast() else x.dtype
        usual = (
            not torch.compiler.is_compiling()
            and x.dtype in _DTYPES
            and weight.dtype in _DTYPES
            and (dtype is weight.dtype or _fits(weight, x, dtype))
            and x.shape[-1] == K
            and A.shape == (R, K)
            and B.shape == (N, R)
            and R > 0
            and A.dtype in _DTYPES
            and B.dtype in _DTYPES
            and (weight.device == device and A.device == device and B.device == device)
            and (bias is None or _is_vector(bias, N, device))
            and (core is None or _is_core(core, R, device))
            and (magnitude is None or _is_vector(magnitude, N if axis == "out" else K, device))
            and (norm is None or (magnitude is not None and norm.shape == magnitude.shape))
            and (norm is None or (norm.dtype in _DTYPES and norm.device == device))
            and (out_scale is None or _is_vector(out_scale, N, device))
            and (lora_bias is None or _is_vector(lora_bias, N, device))
            and seed is None
            and type(scaling) is float
            and scaling - scaling == 0  # neither inf nor nan
            and (type(p) is float or type(p) is int)
            and 0 <= p < 1
            and (p == 0 or 0 < round(p * philox.STEPS) < philox.STEPS)
            and (axis == "out" or (axis == "in" and keep in ("auto", "recompute")))
            and (dropout_on == "adapter" or (dropout_on == "both" and keep != "output"))
            and keep in KEEPS
            and type(frozen_columns) is int
            and 0 <= frozen_columns <= R
        )
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        usual = False
    return dtype if usual else _check_call(x, tensors, options)


def _is_vector(vector: torch.Tensor, length: int, device: torch.device) -> bool:
    return vector.shape == (length,) and vector.dtype in _DTYPES and vector.device == device


def _is_core(core: torch.Tensor, R: int, device: torch.device) -> bool:
    shaped = core.shape == (R, R) or core.shape == (R,)
    return shaped and core.dtype in _DTYPES and core.device == device


def _check_call(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> torch.dtype:
    words(options.axis, options.dropout_on, options.keep, options.dropout)
    _has_shape(x)
    floating("x", x)
    N, K, R = factors(tensors, options.axis)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x {tuple(x.shape)} must end in K={K} for weight {(N, K)}")
    _seed(tensors.seed, x)
    for name, tensor in tensors._asdict().items():
        if tensor is not None and tensor.device != x.device:
            waits = tensor.is_meta and not tensors.weight.is_meta
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is on {tensor.device}, "
                f"x {tuple(x.shape)} on {x.device}"
                + ("; lorafast.start_adapters(model) starts it from its weight" if waits else "")
            )
    if tensors.norm is not None and tensors.magnitude is None:
        raise ValueError(f"norm {tuple(tensors.norm.shape)} is given without magnitude")
    dtype = activation_dtype(x)
    if not _fits(tensors.weight, x, dtype):
        raise TypeError(
            f"weight {tuple(tensors.weight.shape)} is {tensors.weight.dtype}, "
            f"x {tuple(x.shape)} is {x.dtype}: without autocast they must be equal"
        )
    _scaling(options.scaling, x)
    columns = options.frozen_columns
    # A symbolic integer, which torch.compile may pass, is no int but compares like one.
    if not isinstance(columns, int | torch.SymInt) or not 0 <= columns <= R:
        raise ValueError(
            f"frozen_columns {columns!r} must be an integer between 0 and R={R}, lora_B {(N, R)}"
        )
    return dtype


def maskable(x: torch.Tensor) -> None:
    """Check that dropout has a mask for x: one is drawn for every element of a dense tensor."""
    if x.is_nested or x.layout is not torch.strided:
        form = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise NotImplementedError(
            f"x {tuple(x.shape)} is a {form} tensor, for which there is no dropout: "
            "use dropout=0.0, eval(), or a dense x"
        )


@contextlib.contextmanager
def readable(weight: torch.Tensor) -> Iterator[None]:
    """Return a context in which a weight that lacks an operation is refused in words."""
    try:
        yield
    except NotImplementedError as error:
        if not torch_internals.is_foreign(weight):
            raise
        kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
        raise TypeError(
            f"weight {tuple(weight.shape)} is a {kind}, which lacks an operation that this adapter "
            "needs; was the model quantised after it was adapted? Keep the adapted layers out of "
            "that, or leave the model to PEFT"
        ) from error


def norm(tensors: LayerTensors, axis: str) -> None:
    """Check everything that lorafast.functional.row_norm is given but its scaling."""
    word("axis", axis, AXES)
    factors(tensors, axis)


def factors(t: LayerTensors, axis: str) -> tuple[int, int, int]:
    """Check the weight and every tensor whose shape follows from it; return N, K and R."""
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
    """Check the words of DoRA, alone and together."""
    word("axis", axis, AXES)
    word("dropout_on", dropout_on, DROPOUT_ON)
    word("keep", keep, KEEPS)
    probability(dropout)
    if keep == "output" and dropout > 0 and dropout_on == "both":
        raise ValueError(
            "keep='output' cannot serve dropout_on='both', whose output is no multiple of z; "
            "use keep='inner'"
        )
    if axis == "in" and keep in ("output", "inner"):
        raise ValueError(
            f"keep={keep!r} belongs to axis='out'; "
            "axis='in' computes gain⊙x again in backward and keeps nothing more"
        )


def word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check that the value is one of the allowed words."""
    if value not in allowed:
        meant = nearest(value, allowed) if isinstance(value, str) else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}{hint}")


def probability(dropout: float) -> None:
    """Check that dropout is in [0, 1) and differs from 0 and 1 in 16 bits."""
    if not isinstance(dropout, int | float):
        raise TypeError(
            f"dropout {dropout!r} must be a number in [0, 1), not {type(dropout).__name__}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be in [0, 1)")
    philox.threshold(dropout)


def whole(name: str, value: int, least: int = 1) -> None:
    """Check that the value is an integer of at least `least`, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def number(name: str, value: float, below: float = math.inf) -> None:
    """Check that the value is a number in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        raise ValueError(f"{name}={value!r} must be a number in [0, {below})")


def floating(name: str, tensor: torch.Tensor) -> None:
    """Check that it is a tensor of fp64, fp32, bf16 or fp16."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} {tuple(tensor.shape)} is {tensor.dtype}; "
            "lorafast computes in float64, float32, bfloat16 and float16"
        )


def pair(name: str, tensor: torch.Tensor, form: str) -> None:
    """Check that it is a matrix of floating-point numbers."""
    floating(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} {tuple(tensor.shape)} must be {form}")


def shaped(
    name: str, tensor: torch.Tensor, shapes: list[tuple[int, ...]], weight: tuple[int, int], R: int
) -> None:
    """Check that it is a tensor of floating-point numbers with one of the shapes."""
    floating(name, tensor)
    if tuple(tensor.shape) not in shapes:
        forms = " or ".join(map(str, map(tuple, shapes)))
        raise ValueError(
            f"{name} {tuple(tensor.shape)} must be {forms} for weight {weight} and rank {R}"
        )


def _has_shape(x: torch.Tensor) -> None:
    if isinstance(x, torch.Tensor) and x.is_nested and x.layout is torch.strided:
        raise TypeError(
            "x is a nested tensor of strided layout, which has no shape: use layout=torch.jagged, "
            "or padding"
        )


def is_seed(seed: torch.Tensor) -> bool:
    """True if it is a tensor of a seed's dtype and shape."""
    return isinstance(seed, torch.Tensor) and seed.dtype == torch.int64 and seed.shape == (1,)


def _seed(seed: torch.Tensor | None, x: torch.Tensor) -> None:
    if seed is not None and not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be an int64 tensor of shape (1,), not {seed!r}")
    if seed is not None and not is_seed(seed):
        raise TypeError(
            f"seed {tuple(seed.shape)} {seed.dtype} must be (1,) int64, in [0, 2**63), "
            f"for x {tuple(x.shape)}"
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
                f"scaling {tuple(scaling.shape)} is on {scaling.device}, "
                f"x {tuple(x.shape)} on {x.device}"
            )
    elif isinstance(scaling, float) and scaling - scaling != 0:
        # inf and nan, in a form that torch.compile traces.
        raise ValueError(f"scaling {scaling} must be finite")
    elif not isinstance(scaling, int | float | torch.SymFloat):
        raise TypeError(f"scaling must be a number or a tensor of one element, not {scaling!r}")


def _fits(weight: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if the weight has the dtype of the call, or autocast brings the two together."""
    if weight.dtype == dtype:
        return True
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return cast and torch.float64 not in (weight.dtype, dtype)

"""Random calls of a layer, forward and backward: methods, flags, and tensors of any strides."""

import random
from typing import NamedTuple

import torch

from lorafast.engine import formula
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors

METHODS = ("lora", "dora", "lamda", "adalora", "vera")
_X = ("plain", "slice", "transposed", "aligned offset", "alternate", "offset", "expanded")
_W = ("plain", "plain", "transposed", "slice", "aligned offset", "alternate", "offset")
_DY = ("plain", "expanded", "one number", "transposed", "aligned offset", "offset")
_FACTOR = ("plain", "plain", "offset", "transposed")


class Call(NamedTuple):
    """One call. told: its sizes, flags and layouts in words."""

    x: torch.Tensor
    dy: torch.Tensor
    tensors: LayerTensors
    options: CallOptions
    needs: GradMask
    told: dict[str, object]


class Draw(random.Random):
    """Draws, and remembers in words what it drew."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.told: dict[str, object] = {"case": seed}

    def pick(self, name: str, options):
        """Return one of several options."""
        self.told[name] = self.choice(list(options))
        return self.told[name]

    def maybe(self, name: str, share: float = 0.5) -> bool:
        """Return True in some cases."""
        self.told[name] = self.random() < share
        return self.told[name]


def laid(layout: str, values: torch.Tensor) -> torch.Tensor:
    """Return a matrix with the same values, in memory as the layout says, NaN around it.

    expanded: all rows are the first one. one number: all elements are the first one.
    """
    rows, columns = values.shape
    if layout in ("expanded", "one number"):
        first = values[:1, : 1 if layout == "one number" else None]
        return (first if rows else values.new_zeros(1, 1)).expand(rows, columns)
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "alternate":
        wide = values.new_full((2 * rows, columns), float("nan"))[::2]
    elif layout == "plain":
        return values.contiguous()
    else:
        before, after = {"slice": (0, 3), "offset": (1, 15), "aligned offset": (8, 8)}[layout]
        width = before + columns + after
        wide = values.new_full((rows, width), float("nan"))[:, before : before + columns]
    return wide.copy_(values)


def call(seed: int) -> Call:
    """Return a random call."""
    draw, method = Draw(seed), METHODS[seed % len(METHODS)]
    draw.told["method"] = method
    M, K, N = (draw.pick(name, sizes) for name, sizes in _SIZES.items())
    R, dtype = draw.pick("R", (1, 3, 8, 16, 20, 64)), draw.pick("dtype", _HALVES)
    factor = draw.pick("factor", (torch.float32, dtype))

    def matrix(name, rows, columns, layouts, kind=dtype):
        return laid(draw.pick(name, layouts), torch.randn(rows, columns).to(kind))

    p, magnitude = draw.pick("p", (0.0, 0.05)), None
    core = {"lamda": (R, R), "adalora": (R,), "vera": (R,)}.get(method)
    keep = "none"
    if method == "dora":
        magnitude, keep = torch.ones(N), draw.pick("keep", ("output", "inner", "recompute"))
    scale = torch.tensor(1.5) if draw.maybe("scale", 0.2) else None
    tensors = LayerTensors(
        weight=matrix("weight", N, K, _W),
        bias=torch.randn(N).to(dtype) if draw.maybe("bias", 0.4) else None,
        lora_A=matrix("A", R, K, _FACTOR, factor),
        lora_B=matrix("B", N, R, _FACTOR, factor),
        core=None if core is None else torch.randn(core),
        magnitude=magnitude,
        out_scale=torch.randn(N) if method == "vera" else None,
        lora_bias=torch.randn(N) if draw.maybe("lora_bias", 0.2) else None,
        seed=torch.tensor([seed]) if p else None,
        scale=scale,
    )
    both = method == "dora" and keep != "output" and draw.maybe("both")
    frozen = draw.pick("frozen", (0, 0, R // 2, R)) if method == "lamda" else 0
    options = CallOptions(
        2.0 if scale is None else 1.0, p, "out", "both" if both else "adapter", keep, frozen
    )
    needs = GradMask(
        x=draw.maybe("need x", 0.8),
        bias=tensors.bias is not None and draw.maybe("need bias"),
        lora_A=method in ("lora", "dora", "adalora"),
        lora_B=draw.maybe("need B", 0.9),
        core=core is not None,
        magnitude=magnitude is not None,
        out_scale=tensors.out_scale is not None,
        lora_bias=tensors.lora_bias is not None,
    )
    x, dy = matrix("x", M, K, _X), matrix("dy", M, N, _DY)
    return Call(x, dy, tensors, options, needs, draw.told)


_SIZES = {
    "M": (1, 2, 17, 64, 130, 0),
    "K": (8, 24, 40, 64, 128, 1040),
    "N": (8, 24, 64, 72, 96, 1032),
}
_HALVES = (torch.bfloat16, torch.float16)


def run(one: Call) -> dict[str, torch.Tensor]:
    """Return y, h and every gradient of a call, after checking their shapes and dtypes."""
    tensors, options = one.tensors, one.options
    if tensors.magnitude is not None:
        tensors = tensors._replace(norm=formula.row_norm(tensors, options))
    y, h, z = formula.forward(one.x, tensors, options)
    saved = formula.saved_mask(one.needs, options, tensors.magnitude is not None)
    kept = y if saved.y else z if saved.z else None
    grads = formula.backward(
        one.dy, one.x if saved.x else None, h if saved.h else None, kept, tensors, options,
        one.needs,
    )  # fmt: skip
    assert y.shape == one.dy.shape
    assert y.is_contiguous()
    found = {"y": y, "h": h}
    for name, need, grad in zip(GradMask._fields, one.needs, grads, strict=True):
        if need:
            like = one.x if name == "x" else getattr(tensors, name)
            assert (grad.shape, grad.dtype) == (like.shape, like.dtype), name
            found[f"d_{name}"] = grad
    return found

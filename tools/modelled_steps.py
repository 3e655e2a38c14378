"""Write the modelled time of a training step on an H200 into docs/modelled-steps.md.

    python tools/modelled_steps.py           write the page
    python tools/modelled_steps.py --print   print the tables

A model, and no measurement: nothing here needs a GPU. One forward and backward pass of a layer runs
on meta tensors, and every operation of torch and every launch of a kernel is noted; the page says
how they are counted.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "modelled-steps.md"
BEGIN, END = "<!-- modelled: begin -->", "<!-- modelled: end -->"
# An H200: bytes/s of a copy, flop/s of products in bf16 and fp32, multiprocessors, clock, and the
# latency of memory.
BANDWIDTH, HALF_FLOPS, FULL_FLOPS = 4.3e12, 790e12, 55e12
PROCESSORS, CLOCK, LATENCY = 132, 1.755e9, 0.65e-6
CAPABILITY = 90
# Lanes that a multiprocessor issues, and those of its pipe of integer logic, in one cycle.
ISSUED, INTEGER = 128, 64
LEAST, GAP = 1.0e-6, 1.5e-6
# A primitive is served by the kernels where they take at most this share of eager's time.
WORTH = 0.97
RANK, DROPOUT = 16, 0.05
SHAPES = ((1024, 1024), (4096, 4096))
TOKENS = (2048, 8192)
METHODS = ("LoRA", "DoRA", "LaMDA")
BF16 = torch.bfloat16

# Operations that launch nothing.
_VIEWS = frozenset(
    {
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
        "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "select", "slice",
        "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
    }
)  # fmt: skip
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")


class Work(NamedTuple):
    """One operation of torch, or one launch. seconds: without the gap behind it."""

    name: str
    bytes: int
    seconds: float


class Trace(TorchDispatchMode):
    """The operations and launches of what runs inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        if name not in _VIEWS and function.namespace == "aten":
            self.works.append(_operation(name, args, kwargs, result))
        return result

    @property
    def seconds(self) -> float:
        """The modelled time of everything."""
        return sum(work.seconds + GAP for work in self.works)


def _operation(name: str, args: tuple, kwargs: dict, result: object) -> Work:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    read = [tensor for tensor in tensors if tensor is not kwargs.get("out")]
    if name in _OVERWRITES or (name == "addmm_" and kwargs.get("beta", 1) == 0):
        read = read[1:]
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    moved = sum(map(_bytes, (*read, *written)))
    seconds = moved / BANDWIDTH
    if name in _PRODUCTS:
        a, b = [t for t in tensors if t is not kwargs.get("out")][_PRODUCTS[name] :][:2]
        flops = 2 * math.prod(a.shape) * b.shape[-1]
        seconds = max(seconds, flops / (HALF_FLOPS if a.dtype.itemsize == 2 else FULL_FLOPS))
    return Work(name, moved, max(seconds, LEAST))


def _bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's elements; those that an expanded dimension repeats count once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.element_size()


class Counts(NamedTuple):
    """What the machine code of a streaming kernel's loop does.

    instructions, integer: of a thread for an element of the large operand. in_flight: bytes on
    their way to a multiprocessor.
    """

    instructions: float
    integer: float
    in_flight: float


# For each kernel that passes over a large operand: the name of its argument, and the call of
# helpers.reference_launches whose machine code is counted, by the constants.
_STREAMS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "project_kernel": ("x_ptr", lambda c: "project" + ", dropout" * bool(c["DROPS"])),
    "grad_project_kernel": ("x_ptr", lambda c: "grad_project" + ", dropout" * bool(c["DROPS"])),
    "low_rank_add_kernel": (
        "out_ptr",
        lambda c: "low_rank_add" + ", accumulated" * bool(c["ACCUMULATES"]),
    ),
    "grad_output_kernel": ("dy_ptr", lambda c: "grad_output" + _SUMS[c["SUMS"]]),
    "row_norm_kernel": ("W_ptr", lambda c: "row_norm, rows"),
    "drop_kernel": ("x_ptr", lambda c: "drop" + ", accumulated" * bool(c["ACCUMULATES"])),
}
_SUMS = ("", ", bias", ", kept")


@functools.cache
def counts_of(call: str) -> Counts:
    """Count the loop of a reference call in its machine code for sm_90."""
    from helpers.reference_launches import figures_of

    found = figures_of(call, RANK, CAPABILITY)
    in_flight = math.inf if found.bytes_in_flight is None else found.bytes_in_flight
    return Counts(found.instructions, found.alu, in_flight)


def _launch(kernel: str, arguments: dict[str, Any]) -> Work:
    """The work of one launch; that of a product is added where it is called."""
    tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    # A tensor that stands in for an absent one is neither read nor written.
    moved = sum(_bytes(tensor) for tensor in {id(t): t for t in tensors.values()}.values())
    if kernel not in _STREAMS:
        return Work(kernel, moved, max(moved / BANDWIDTH, LEAST))
    large, call = _STREAMS[kernel]
    if arguments.get("ACCUMULATES"):
        moved += _bytes(tensors["out_ptr"])
    counts, elements = counts_of(call(arguments)), tensors[large].numel()
    seconds = max(
        moved / min(BANDWIDTH, PROCESSORS * counts.in_flight / LATENCY),
        elements * counts.instructions / (ISSUED * PROCESSORS * CLOCK),
        elements * counts.integer / (INTEGER * PROCESSORS * CLOCK),
        LEAST,
    )
    return Work(kernel, moved, seconds)


def _gemm(trace: Trace, out: torch.Tensor, summands: list, masked: Any, route: Any) -> None:
    """Note a product of ours: its flops at the speed assumed of its form, and its mask."""
    from lorafast.engine.kernels import gpu_specs
    from lorafast.runtime import devices

    terms = [*summands, *([masked] if masked else [])]
    flops = sum(2 * out.numel() * term.a.shape[1] for term in terms)
    moved = _bytes(out) + sum(_bytes(term.a) + _bytes(term.b) for term in terms)
    speed = HALF_FLOPS * gpu_specs.device(
        devices.Arch("nvidia", f"sm_{CAPABILITY}", PROCESSORS)
    ).speed(route.form)
    seconds = max(flops / speed, moved / BANDWIDTH, LEAST)
    if masked:
        integer = counts_of("project, dropout").integer - counts_of("project").integer
        seconds += out.numel() * integer / (INTEGER * PROCESSORS * CLOCK)
    trace.works.append(Work(f"gemm {route.form}", moved, seconds))


@contextlib.contextmanager
def pretended(trace: Trace) -> Iterator[None]:
    """Return a context in which fake CUDA tensors are those of an H200, and launches are noted."""
    from lorafast.engine import kernel_choice
    from lorafast.engine.backends import triton as backend
    from lorafast.engine.kernels import launch
    from lorafast.runtime import devices

    def run(kernel, grid, tile, *args, **constants):
        named = dict(zip(kernel.arg_names, args, strict=False))
        trace.works.append(_launch(kernel.fn.__name__, named | constants))

    def gemm(out, summands, masked, route, *more):
        _gemm(trace, out, summands, masked, route)

    arch = devices.Arch("nvidia", f"sm_{CAPABILITY}", PROCESSORS)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (launch, "run", run),
            (backend, "gemm", gemm),
            (kernel_choice, "measured_specs", lambda *_: None),
            (launch, "on", lambda x: contextlib.nullcontext()),
            (devices, "of", lambda device: arch),
            (devices, "has_mixed_gemm", lambda device: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Chosen:
    """A backend of which each primitive is the kernels' or eager's, whichever the model prefers."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.took: dict[str, str] = {}

    def __getattr__(self, primitive: str) -> Callable:
        from lorafast.engine.backends import eager, triton

        def run(*args, **kwargs):
            before = list(self.trace.works)
            tried = []
            for backend in (eager, triton):
                self.trace.works = []
                result = getattr(backend, primitive)(*args, **kwargs)
                tried.append((self.trace.seconds, self.trace.works, result))
            kernels_win = tried[1][0] <= WORTH * tried[0][0]
            self.took[primitive] = "kernels" if kernels_win else "torch"
            _, works, result = tried[kernels_win]
            self.trace.works = before + works
            return result

        return run


class Setting(NamedTuple):
    """One layer and its call."""

    method: str
    N: int
    K: int
    M: int
    p: float


def ours(setting: Setting, way: str) -> tuple[float, dict[str, str]]:
    """Return the modelled seconds of our layer's step, and which way its primitives took.

    way: "torch" for eager with masks by torch's operations, "eager" with those of the kernel, or
    "chosen" among the kernels and eager.
    """
    from lorafast.engine import dispatch, formula, masks
    from lorafast.engine.backends import eager
    from lorafast.engine.problem import CallOptions, GradMask, LayerTensors

    method, N, K, M, p = setting
    trace = Trace()
    with torch.no_grad(), pretended(trace):
        factor = functools.partial(torch.empty, device="meta")
        x, dy = (factor(M, size, dtype=BF16) for size in (K, N))
        tensors = LayerTensors(
            factor(N, K, dtype=BF16), None, factor(RANK, K), factor(N, RANK),
            factor(RANK, RANK) if method == "LaMDA" else None,
            factor(N) if method == "DoRA" else None,
            seed=factor(1, dtype=torch.int64) if p else None,
        )  # fmt: skip
        keep = "output" if method == "DoRA" else "none"
        options = CallOptions(2.0, p, "out", "adapter", keep, 0)
        needs = GradMask(
            x=True, lora_A=method != "LaMDA", lora_B=True, core=method == "LaMDA",
            magnitude=method == "DoRA",
        )  # fmt: skip
        backend = Chosen(trace) if way == "chosen" else eager
        dispatch._routes.cache_clear()
        chosen = mock.patch.object(dispatch.Routes, "__missing__", return_value=backend)
        kernel = mock.patch.object(masks, "kernel_serves", return_value=way != "torch")
        with trace, chosen, kernel:
            if method == "DoRA":
                norm = dispatch.norm_routes(tensors, options)["row_norm"].row_norm(
                    tensors.weight, tensors.lora_A, tensors.lora_B, 2.0, "out"
                )
                tensors = tensors._replace(norm=norm)
            y, h, _ = formula.forward(x, tensors, options)
            kept = y if method == "DoRA" else None
            formula.backward(dy, x, h, kept, tensors, options, needs)
    dispatch._routes.cache_clear()
    return trace.seconds, getattr(backend, "took", {})


def frozen(setting: Setting) -> float:
    """Return the modelled seconds of the frozen layer's step: y, and the gradient of x."""
    _, N, K, M, _ = setting
    return _module_seconds(torch.nn.Linear(K, N, False, "meta", BF16).requires_grad_(False), M)


def peft(setting: Setting, bf16: bool) -> float | None:
    """Return the modelled seconds of PEFT's step, None for what PEFT lacks.

    bf16: the factors are bf16 too, and not fp32 as by default.
    """
    from peft import LoraConfig, get_peft_model

    method, N, K, M, p = setting
    if method == "LaMDA":
        return None
    base = torch.nn.Sequential(torch.nn.Linear(K, N, False, "meta", BF16))
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=p, use_dora=method == "DoRA", target_modules=["0"]
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=not bf16)
    return _module_seconds(model.base_model.model[0].train(), M)


def _module_seconds(module: torch.nn.Module, M: int) -> float:
    """The modelled seconds of a forward and backward pass; where a gradient goes is not counted."""
    x = torch.empty(M, module.in_features, dtype=BF16, device="meta", requires_grad=True)
    dy = torch.empty(M, module.out_features, dtype=BF16, device="meta")
    needed = [x, *(p for p in module.parameters() if p.requires_grad)]
    with Trace() as trace:
        torch.autograd.grad(module(x), needed, dy)
    return trace.seconds


def tables() -> str:
    """Return the tables in Markdown, one for each shape and number of tokens."""
    from helpers.reference_launches import CALLS

    # Before launches are noted instead of compiled.
    for call in CALLS:
        counts_of(call)
    lines = []
    for (N, K), M in itertools.product(SHAPES, TOKENS):
        base = 1e6 * frozen(Setting("", N, K, M, 0.0))
        lines += [
            f"{M} tokens, {K} → {N}; the frozen layer's step is modelled as {base:.0f} µs:",
            "",
            "| method | dropout | torch alone | eager | chosen | PEFT | PEFT, bf16 | by kernels |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method, p in itertools.product(METHODS, (0.0, DROPOUT)):
            lines.append(_row(Setting(method, N, K, M, p)))
        lines.append("")
    return "\n".join(lines)


def _row(setting: Setting) -> str:
    base = frozen(setting)
    (alone, _), (eager, _), (chosen, took) = (
        ours(setting, way) for way in ("torch", "eager", "chosen")
    )
    theirs = [peft(setting, bf16) for bf16 in (False, True)]
    cells = [
        f"{seconds / base:.2f}" if seconds else "–" for seconds in (alone, eager, chosen, *theirs)
    ]
    kernels = ", ".join(f"`{name}`" for name, way in took.items() if way == "kernels") or "–"
    return f"| {setting.method} | {setting.p:g} | {' | '.join(cells)} | {kernels} |"


def main(argv: list[str] | None = None) -> None:
    """Write the page, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print the tables")
    asked = parser.parse_args(argv)
    # The launches of the tests, compiled and not interpreted, are those that are counted.
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    os.environ.pop("TRITON_INTERPRET", None)
    made = tables()
    if asked.print:
        print(made)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()

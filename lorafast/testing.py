"""Problems, the eager chain, error ratios against float64, and saved bytes, for tests and bench.

Nothing here shares code with the reference or a backend: the chain is the textbook sequence of
stock torch ops.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorafast import functional
from lorafast.engine import philox
from lorafast.engine.backends import cpu
from lorafast.engine.error_rule import ratio
from lorafast.runtime import env, torch_internals

SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
GRADIENTS = ("x", "bias", "lora_A", "lora_B", "core", "magnitude", "out_scale", "lora_bias")


@dataclass(frozen=True)
class Form:
    """The parts of the formula that a method uses."""

    name: str
    core: str = "none"
    magnitude: bool = False
    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "auto"
    out_scale: bool = False
    lora_bias: bool = False
    detach_norm: bool = True


FORMS = (
    Form("lora"),
    Form("lora-bias", lora_bias=True),
    Form("lamda", core="full"),
    Form("adalora", core="diagonal"),
    Form("vera", core="diagonal", out_scale=True),
    Form("dora", magnitude=True),
    Form("dora-output", magnitude=True, keep="output"),
    Form("dora-inner", magnitude=True, keep="inner"),
    Form("dora-recompute", magnitude=True, keep="recompute"),
    Form("dora-recompute-bias", magnitude=True, keep="recompute", lora_bias=True),
    Form("dora-both", magnitude=True, dropout_on="both"),
    Form("dora-both-recompute", magnitude=True, dropout_on="both", keep="recompute"),
    Form("dora-exact", magnitude=True, detach_norm=False),
    Form("dora-in", magnitude=True, axis="in"),
    Form("dora-in-both", magnitude=True, axis="in", dropout_on="both"),
    Form("dvora", magnitude=True, core="full", out_scale=True, lora_bias=True),
)


@dataclass(frozen=True)
class Case:
    """One problem; str() is its test id."""

    form: Form
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    dropout: float = 0.0
    bias: bool = True
    scaling: float = 1.7
    adapter_dtype: torch.dtype | None = None
    transposed: bool = False
    # Of dy: a mean over many tokens makes it small.
    grad_scale: float = 1.0

    def __str__(self) -> str:
        flags = (
            [f"p{self.dropout}"] * bool(self.dropout)
            + ["bias"] * self.bias
            + ["transposed"] * self.transposed
            + [f"dy{self.grad_scale:.0e}"] * (self.grad_scale != 1)
        )
        return "-".join(
            [self.form.name, f"M{self.M}-N{self.N}-K{self.K}-R{self.R}", SHORT[self.dtype], *flags]
        )

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the factors: adapter_dtype, else fp32, fp64 beside fp64."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.adapter_dtype or wide

    @property
    def works(self) -> bool:
        """False for keep="output" with a mask on the base term, which exclude each other."""
        return not (self.form.keep == "output" and self.form.dropout_on == "both" and self.dropout)


def make(
    case: Case, seed: int = 0, device: torch.device | str = "cpu", sliced: bool = True
) -> dict[str, torch.Tensor | None]:
    """Return every tensor of the case by its name in lorafast.linear, and dy.

    x and dy are slices of wider tensors, so that no stride is trivial, unless sliced=False. A
    transposed weight lies in memory as [K,N].
    """
    generator = torch.Generator(device).manual_seed(seed)
    left, right = (1, 2) if sliced else (0, 0)
    form, factor = case.form, case.factor_dtype

    def normal(*shape: int, dtype: torch.dtype = factor, scale: float = 1.0) -> torch.Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64, device=device) * scale
        ).to(dtype)

    def rows(width: int, scale: float = 1.0) -> torch.Tensor:
        return normal(case.M, left + width + right, dtype=case.dtype, scale=scale)[
            :, left : left + width
        ]

    weight = normal(case.N, case.K, dtype=case.dtype, scale=case.K**-0.5)
    core = {"none": None, "diagonal": (case.R,), "full": (case.R, case.R)}[form.core]
    gains = case.N if form.axis == "out" else case.K
    return {
        "x": rows(case.K),
        "weight": weight.t().contiguous().t() if case.transposed else weight,
        "bias": normal(case.N, dtype=case.dtype) if case.bias else None,
        "lora_A": normal(case.R, case.K, scale=case.K**-0.5),
        "lora_B": normal(case.N, case.R, scale=case.R**-0.5),
        "core": None if core is None else normal(*core, scale=case.R**-0.5),
        "magnitude": normal(gains).abs() + 0.5 if form.magnitude else None,
        "out_scale": normal(case.N) if form.out_scale else None,
        "lora_bias": normal(case.N) if form.lora_bias else None,
        "seed": torch.randint(0, 2**62, (1,), generator=generator, device=device),
        "dy": rows(case.N, case.grad_scale),
    }


def ours(case: Case, t: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """lorafast.linear on the case."""
    f, norm = case.form, None
    if not f.detach_norm:
        norm = functional.row_norm(
            t["weight"],
            t["lora_A"],
            t["lora_B"],
            t["core"],
            t["out_scale"],
            case.scaling,
            f.axis,
            detach=False,
        )
    names = (
        "x",
        "weight",
        "bias",
        "lora_A",
        "lora_B",
        "core",
        "magnitude",
        "out_scale",
        "lora_bias",
        "seed",
    )
    tensors: dict[str, Any] = {name: t[name] for name in names}
    return functional.linear(
        **tensors, norm=norm, axis=f.axis, scaling=case.scaling, dropout=case.dropout,
        dropout_on=f.dropout_on, keep=f.keep,
    )  # fmt: skip


def chain(
    case: Case,
    t: dict[str, torch.Tensor | None],
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the output of the eager chain: stock torch ops, factors cast to x's dtype.

    In float64 it is the truth. It computes nothing that a reader would not type, so it can be
    timed too.

    drop: drops elements of x, if not the mask of t["seed"].
    factor_dtype: the dtype of all but the base product, if not x's. With fp32 it is what PEFT
        computes with fp32 factors on a half-precision base: x is cast, not the factors.
    """
    f, s, x, W, dtype = case.form, case.scaling, t["x"], t["weight"], factor_dtype or t["x"].dtype
    A, B, core, m, b_B = (
        None if t[name] is None else t[name].to(dtype)
        for name in ("lora_A", "lora_B", "core", "magnitude", "lora_bias")
    )
    out_scale = None if t["out_scale"] is None else t["out_scale"].to(dtype)
    dropped = x.to(dtype)
    if case.dropout and drop:
        dropped = drop(dropped)
    elif case.dropout:
        kept = philox.keep_mask(t["seed"], case.dropout, slice(0, x.shape[0]), x.shape[1])
        dropped = dropped * (kept.to(dtype) * philox.scale(case.dropout))

    def base(z: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(z, W.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def low_rank(z: torch.Tensor) -> torch.Tensor:
        h = F.linear(z, A)
        if core is not None:
            h = h * core if core.dim() == 1 else F.linear(h, core)
        low = F.linear(h, B)
        if out_scale is not None:
            low = low * out_scale
        low = low if b_B is None else low + b_B
        return low if s == 1 else low * s

    if m is None:
        return (base(x, t["bias"]) + low_rank(dropped)).to(x.dtype)
    middle = A if core is None else (core[:, None] * A if core.dim() == 1 else core @ A)
    delta = B @ middle if out_scale is None else out_scale[:, None] * (B @ middle)
    norm = (W.to(dtype) + s * delta).norm(dim=1 if f.axis == "out" else 0)
    gain = m / (norm.detach() if f.detach_norm else norm)
    if f.axis == "in":
        base_x = x * gain if f.dropout_on == "adapter" else x + (gain - 1) * dropped
        return (base(base_x, t["bias"]) + low_rank(dropped * gain)).to(x.dtype)
    if f.dropout_on == "adapter":
        y = gain * (base(x) + low_rank(dropped))
        return (y if t["bias"] is None else y + t["bias"]).to(x.dtype)
    y = base(x, t["bias"]) + (gain - 1) * base(dropped) + gain * low_rank(dropped)
    return y.to(x.dtype)


def run(
    function: Callable,
    case: Case,
    tensors: dict[str, torch.Tensor | None],
    wide: bool = False,
    trained: Iterable[str] = GRADIENTS,
) -> dict[str, torch.Tensor]:
    """Return y and the gradient of every `trained` tensor of function(case, tensors).

    wide: compute in float64 throughout.
    """
    trained = tuple(trained)
    t = {name: leaf(name, value, wide, trained) for name, value in tensors.items()}
    y = function(case, t)
    if trained:
        y.backward(t["dy"])
    return {"y": y.detach()} | {name: t[name].grad for name in trained if t[name] is not None}


class Yardstick:
    """The float64 truth of a case over all seeds, and the eager chain's distance from it.

    Where the factors are wider than x, the chain in their dtype is a second yardstick, because the
    first one loses what x's dtype cannot hold, small gradients in fp16. What is kept for backward
    has x's dtype, so that one rounding to it, eps/2, is the least error there.

    function: the chain; it takes factor_dtype, as chain does.
    """

    def __init__(
        self,
        case: Case,
        made: Iterable[dict[str, torch.Tensor | None]],
        function: Callable = chain,
        trained: Iterable[str] = GRADIENTS,
    ) -> None:
        self.case, self.made = case, tuple(made)
        self._truths = [run(function, case, tensors, True, trained) for tensors in self.made]
        self._rms = {name: 0.0 for name in self._truths[0]}
        for truth in self._truths:
            for name, value in truth.items():
                self._rms[name] += value.square().sum().item()
        self._chains = [self._measured(functools.partial(run, function, trained=trained), 8)]
        if torch.finfo(case.factor_dtype).bits > torch.finfo(case.dtype).bits:
            wide = functools.partial(function, factor_dtype=case.factor_dtype)
            self._chains.append(self._measured(functools.partial(run, wide, trained=trained), 2))

    def ratios(
        self, outcome: Callable[[dict[str, torch.Tensor | None]], dict[str, torch.Tensor]]
    ) -> dict[str, float]:
        """Return max(e, f) ÷ max(e_chain, f) for y and each gradient that outcome(tensors) gives.

        e is the RMS error against float64 over all seeds, f = eps/8·rms(truth). Of two yardsticks
        the larger ratio counts; f of the second one is eps/2·rms(truth).
        """
        errors = self._squares(outcome)
        return {
            name: max(
                ratio(errors[name] ** 0.5, chain[name] ** 0.5, self._rms[name] ** 0.5, floor)
                for chain, floor in self._chains
            )
            for name in self._rms
        }

    def _measured(self, outcome: Callable, parts: int) -> tuple[dict[str, float], float]:
        """The squared errors of a chain, and the floor eps/parts."""
        case = self.case
        return (
            self._squares(lambda tensors: outcome(case, tensors)),
            torch.finfo(case.dtype).eps / parts,
        )

    def _squares(self, outcome: Callable) -> dict[str, float]:
        sums = {name: 0.0 for name in self._rms}
        for tensors, truth in zip(self.made, self._truths, strict=True):
            got = outcome(tensors)
            for name, value in truth.items():
                # A missing gradient counts as infinitely wrong.
                missing = got.get(name) is None
                sums[name] += math.inf if missing else (got[name] - value).square().sum().item()
        return sums


def error_ratios(
    case: Case, function: Callable = ours, seeds: Iterable[int] = range(4)
) -> dict[str, float]:
    """Return the error ratios of function(case, tensors) for y and each gradient."""
    yardstick = Yardstick(case, (make(case, seed) for seed in seeds))
    return yardstick.ratios(lambda tensors: run(function, case, tensors))


@dataclass(frozen=True)
class Saved:
    """The tensors autograd keeps: bytes made for it, and names of tensors kept by reference.

    Those by reference are inputs and the output.
    """

    own: int
    referenced: frozenset[str]


class _Kept:
    """An object the graph holds instead of a tensor: while it lives, autograd keeps the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Detached: an output would hold the graph that holds it.
        self.tensor = tensor.detach()


def saved(
    function: Callable[[], torch.Tensor],
    named: dict[str, torch.Tensor],
    constant: Iterable[torch.Tensor],
) -> Saved:
    """Return what the graph of function() keeps, as saved_tensors_hooks see it.

    Counted is what the graph still holds once function has returned: numel·itemsize once per
    data_ptr, and no more of a storage than it has (views and expanded tensors count once).

    constant: parameters and buffers, which are left out.
    named: tensors that are kept by reference, as the output "y" is.
    """
    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        y = function()
    storages: dict[int, dict[int, torch.Tensor]] = {}
    for kept in filter(None, (reference() for reference in packed)):
        views = storages.setdefault(torch_internals.storage_key(kept.tensor), {})
        largest = views.get(kept.tensor.data_ptr())
        if largest is None or largest.numel() < kept.tensor.numel():
            views[kept.tensor.data_ptr()] = kept.tensor
    names = {torch_internals.storage_key(t): name for name, t in (named | {"y": y}).items()}
    left_out = {torch_internals.storage_key(t) for t in constant}
    own = 0
    for storage, views in storages.items():
        if storage not in names and storage not in left_out:
            whole = next(iter(views.values())).untyped_storage().nbytes()
            own += min(whole, sum(t.numel() * t.itemsize for t in views.values()))
    return Saved(own, frozenset(names[storage] for storage in storages if storage in names))


class Allocated(NamedTuple):
    """Bytes that a function allocated.

    held: alive when it has returned, its result among them. peak: the most at one time.
    """

    held: int
    peak: int


def allocated(function: Callable[[], object]) -> Allocated:
    """Return the bytes that function() allocates on the CPU.

    They are counted from the events of torch's allocator, so that workspaces inside ops and
    compiled code are seen too. The largest workspace of lorafast's C++ kernels, which is not
    torch's, is added to the peak.
    """
    env.silence_profiler()
    cpu.workspace()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    events = torch_internals.allocations(profile)
    del kept
    alive: dict[int, int] = {}
    now = peak = 0
    for _, address, size in events:
        if size > 0:
            alive[address] = size
            now += size
        else:  # what was there before does not count
            now -= alive.pop(address, 0)
        peak = max(peak, now)
    return Allocated(now, peak + cpu.workspace())


def leaf(
    name: str, value: torch.Tensor | None, wide: bool = False, trained: Iterable[str] = GRADIENTS
) -> torch.Tensor | None:
    """Return the tensor as a leaf that requires grad if it is `trained`; in float64 if wide."""
    if value is None or name == "seed":
        return value
    value = value.double() if wide else value
    return value.detach().requires_grad_(name in trained)

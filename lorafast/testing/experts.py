"""Problems of a layer of experts: their tensors, lorafast.grouped_linear, and the eager chain."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from lorafast.engine import philox
from lorafast.engine.grouped.call import grouped_linear_checked
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.testing.layers import chain
from lorafast.testing.problems import Case, make

_OF_EXPERT = (
    "weight", "bias", "lora_A", "lora_B", "core", "magnitude", "out_scale", "lora_bias",
)  # fmt: skip


@dataclass(frozen=True)
class ExpertsCase:
    """A problem of one layer, case, with an expert for each of counts, the rows of that expert.

    case.M is ignored. shared: "A" or "B", the factor that all experts share.
    """

    case: Case
    counts: tuple[int, ...]
    shared: str = ""

    def __str__(self) -> str:
        counts = ".".join(map(str, self.counts))
        return f"{self.case}-rows{counts}" + f"-shared{self.shared}" * bool(self.shared)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x and of the weights."""
        return self.case.dtype

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.case.factor_dtype

    @property
    def S(self) -> int:
        """The rows of all experts."""
        return sum(self.counts)

    @property
    def offsets(self) -> torch.Tensor:
        """Where the rows of each expert begin, int32 [E+1]."""
        return torch.tensor((0, *self.counts)).cumsum(0).int()

    @property
    def rows(self) -> torch.Tensor:
        """The index of each row before they were sorted, int64 [S]."""
        return torch.randperm(self.S, generator=torch.Generator().manual_seed(self.S))


def make_experts(
    case: ExpertsCase, seed: int = 0, sliced: bool = True
) -> dict[str, torch.Tensor | None]:
    """Return every tensor of the case by its name in lorafast.grouped_linear, and dy.

    Offsets and rows, which are no numbers of the formula, are the case's own.
    """
    of_rows = make(replace(case.case, M=case.S), seed, sliced=sliced)
    each = [make(replace(case.case, M=0), seed + e) for e in range(len(case.counts))]
    made = dict(of_rows)
    for name in _OF_EXPERT:
        if of_rows[name] is not None:
            stacked = torch.stack([one[name] for one in each])
            made[name] = stacked[0] if name == f"lora_{case.shared}" else stacked
    if case.case.transposed:
        made["weight"] = made["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    return made


def ours_experts(case: ExpertsCase, t: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """Return the output of lorafast.grouped_linear on the case."""
    one, form = case.case, case.case.form
    tensors = LayerTensors(
        t["weight"], t["bias"], t["lora_A"], t["lora_B"], t["core"], t["magnitude"], None,
        t["out_scale"], t["lora_bias"], t["seed"],
    )  # fmt: skip
    options = CallOptions(one.scaling, one.dropout, form.axis, form.dropout_on, form.keep)
    groups = Groups(case.offsets, case.rows)
    return grouped_linear_checked(t["x"], groups, tensors, options, detach_norm=form.detach_norm)


def chain_experts(
    case: ExpertsCase,
    t: dict[str, torch.Tensor | None],
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the eager chain's output, expert by expert. In float64 it is the truth."""
    parts, start, p = [], 0, case.case.dropout
    for expert, count in enumerate(case.counts):
        own = slice(start, start + count)
        start += count
        tensors = dict(t, x=t["x"][own])
        for name in _OF_EXPERT:
            if t[name] is not None and name != f"lora_{case.shared}":
                tensors[name] = t[name][expert]
        index = case.rows[own]
        drop = functools.partial(_drop, t["seed"], p, index) if p else None
        parts.append(chain(case.case, tensors, drop, factor_dtype))
    return torch.cat(parts)


def _drop(seed: torch.Tensor, p: float, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """drop(x) of rows with these indices."""
    kept = philox.keep_mask(
        seed, p, slice(0, int(index.max()) + 1 if len(index) else 0), x.shape[1]
    )
    return x * (kept[index].to(x.dtype) * philox.scale(p))

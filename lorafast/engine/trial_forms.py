"""The forms of kernels that a trial tries on a GPU, the entries of its verdict, and a verdict.

A form is a kernel of one backend in one dtype; one for ranks above RANKS is a form of its own. An
entry has the forms of one backend that are tried one after another. Imports no triton.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# In the order of trust: what is tried first is the simplest, and the most useful.
STREAMS = ("drop", "project", "grad_output", "grad_project", "low_rank_add", "row_norm")
GEMMS = ("gemm_pointers", "gemm_tma")
HALVES = (torch.bfloat16, torch.float16)
# The largest rank of the forms that are tried first.
RANKS = 64
# The backends whose kernels are tried.
TRITON, CUDA = "triton", "cuda"
# The step of a trial that measures the right forms of an entry, the last one.
SPEED = "speed"
# What a reason begins with where a form ran out of memory.
OUT_OF_MEMORY = "out of memory"
# Bytes of the device that every trial can be done in, and its child's context.
ENOUGH_MEMORY = 4 << 30


class Form(NamedTuple):
    """A backend's kernel in one dtype, for ranks up to RANKS or for more (wide).

    str() is its name, which is unique among all entries.
    """

    kernel: str
    dtype: torch.dtype
    wide: bool = False
    by: str = TRITON

    def __str__(self) -> str:
        ranks = f" R>{RANKS}" if self.wide else ""
        return f"{_prefix(self.by)}{self.kernel} {str(self.dtype).removeprefix('torch.')}{ranks}"


def _prefix(by: str) -> str:
    """Triton's names begin with nothing."""
    return "" if by == TRITON else f"{by} "


def _wide(by: str) -> tuple[Form, ...]:
    dtypes = (*HALVES, torch.float32)
    return tuple(Form(kernel, dtype, True, by) for dtype in dtypes for kernel in STREAMS[1:])


# The forms that are tried together, in this order. A name that the process never needs costs it
# nothing.
ENTRIES: dict[str, tuple[Form, ...]] = {
    "streams": tuple(Form(kernel, dtype) for kernel in STREAMS for dtype in HALVES),
    "gemm": tuple(Form(kernel, dtype) for kernel in GEMMS for dtype in HALVES),
    "fp32": tuple(Form(kernel, torch.float32) for kernel in (*STREAMS, GEMMS[0])),
    "ranks": _wide(TRITON),
    "cuda-bf16": tuple(Form(kernel, torch.bfloat16, by=CUDA) for kernel in STREAMS),
    "cuda-fp16": tuple(Form(kernel, torch.float16, by=CUDA) for kernel in STREAMS),
    "cuda-fp32": tuple(Form(kernel, torch.float32, by=CUDA) for kernel in STREAMS),
    "cuda-ranks": _wide(CUDA),
}
# The entries that one trial tries where neither has a verdict: a child starts once for both. It
# takes about a minute, most of it in compilers. On one core NVRTC compiles a form of 16 bits in
# 0.2 s and one of fp32 in 0.4 s; there are 182 of each half dtype, 141 of fp32, 127 of wide ranks.
_TOGETHER = (
    ("streams", "cuda-bf16"),
    ("streams", "cuda-fp16"),
    ("fp32", "cuda-fp32"),
    ("ranks", "cuda-ranks"),
)


def together(entry: str) -> tuple[str, ...]:
    """Return the entries that are tried with one, itself among them, in their order.

    With Triton's in 16 bits it is the more usual dtype of the cuda backend.
    """
    return next((entries for entries in _TOGETHER if entry in entries), (entry,))


def backend_of(entry: str) -> str:
    """Return the backend whose forms an entry has."""
    return ENTRIES[entry][0].by


def speed_of(by: str) -> str:
    """Return the name of the step that measures a backend's forms."""
    return f"{_prefix(by)}{SPEED}"


# Compared by identity, so that what follows from a verdict can be remembered by it.
@dataclass(frozen=True, eq=False)
class Verdict:
    """What is known of one entry's forms on one GPU.

    forms: each form's name, with "" if it is right and the reason in words if it does not serve.
    rates: constants that were measured; kernels/measured.py says what they mean.
    reason: why a form does not serve that `forms` does not name.
    seconds: how long the trial took. when: the time of its end, in seconds since 1970. free: the
    bytes of the device that were free when it began, if a form ran out of memory.
    """

    forms: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    reason: str = "has not been tried on this GPU"
    seconds: float = 0.0
    when: float = 0.0
    free: int = 0

    @property
    def was_short(self) -> bool:
        """True if a form ran out of memory on a device that had little of it."""
        short = any(reason.startswith(OUT_OF_MEMORY) for reason in self.forms.values())
        return short and self.free < ENOUGH_MEMORY

    def why_not(self, form: Form) -> str:
        """Why the form does not serve; "" if it does."""
        return self.forms.get(str(form), self.reason)

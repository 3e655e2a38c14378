"""What a trial measured on a GPU, as the expected time of a primitive by the kernels and by eager.

The constants are rates (bytes/s of a stream on a layer that fills the GPU, in the time that the
device takes) and least times (seconds of a call whose sizes do not count: its launches, or what
Python takes for them). A call takes the longer of the two. Of the `cuda` backend only rates are
measured: what a launch costs does not count there. Pure functions, so that processes with the same
constants choose alike. Imports no triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorafast.engine.kernels import cost, gpu_specs
from lorafast.engine.kernels.cost import Cost
from lorafast.engine.kernels.gpu_specs import Device
from lorafast.engine.problem import Problem
from lorafast.runtime.devices import Arch

# The constants that are none of streams: bytes/s of a copy, and flop/s of torch's product of a
# large and of a small layer. Those of our GEMM's forms are their speeds by torch's.
COPY, PRODUCT, SMALL_PRODUCT = "copy", "product", "small product"
KERNELS, EAGER, CUDA = "kernels", "eager", "cuda"
# The streaming kernels that drop elements, and are measured with dropout too.
DROPPED = ("project", "grad_project", "low_rank_add", "grad_input", "drop")
# What passes over the result of a product whose base is torch's; the cuda backend measures them.
_ADDITIONS = ("low_rank_add", "grad_input", "linear")
# A primitive is served by the kernels if they are expected to take at most this share of the time.
GAIN = 0.97


class Expected(NamedTuple):
    """The seconds that a primitive is expected to take by the kernels and by eager."""

    kernels: float
    eager: float

    @property
    def why_not(self) -> str:
        """Why the kernels should not serve, in words; "" if they should."""
        if self.kernels <= GAIN * self.eager:
            return ""
        share = self.kernels / self.eager
        return f"is expected to take {share:.2f} × eager's time here; at most {GAIN} is worth it"


def stream(kernel: str, problem: Problem) -> str:
    """Return the name of the constants of a streaming kernel on a problem."""
    dropped = problem.dropout > 0 and kernel in DROPPED
    if kernel == "grad_input":
        dropped = dropped and problem.dropout_on == "adapter"
    gained = kernel == "linear" and problem.gain == "out"
    kept = problem.gain == "out" and (
        (kernel == "grad_output" and problem.keep != "none")
        or (kernel == "linear" and problem.keep == "inner")
    )
    words = {" dropped": dropped, " gained": gained, " kept": kept}
    return kernel + "".join(word for word, applies in words.items() if applies)


def rate(name: str, by: str) -> str:
    """Return the name of a stream's rate by KERNELS, by EAGER or by CUDA."""
    return f"{name}: bytes/s by {by}"


def least(name: str, by: str) -> str:
    """Return the name of a stream's least time by KERNELS or by EAGER."""
    return f"{name}: least seconds by {by}"


def bytes_of(kernel: str, problem: Problem) -> int:
    """Return the least bytes of a streaming kernel; an addition reads and writes a result."""
    if kernel in (*_ADDITIONS, "drop"):
        columns = sum(problem.N) if kernel == "linear" else problem.K
        return 2 * problem.dtype.itemsize * problem.M * columns
    found: Cost = getattr(cost, kernel)(problem)
    return found.bytes


def expected(kernel: str, problem: Problem, rates: dict[str, float]) -> Expected | None:
    """Return what a streaming kernel is expected to take; None if that was not measured."""
    name, moved = stream(kernel, problem), bytes_of(kernel, problem)
    try:
        return Expected(
            *(max(rates[least(name, by)], moved / rates[rate(name, by)]) for by in (KERNELS, EAGER))
        )
    except KeyError:
        return None


def seconds(kernel: str, problem: Problem, rates: dict[str, float], by: str) -> float | None:
    """Return what a stream takes of the device's time by KERNELS, by EAGER or by CUDA, at the rate
    that was measured on a large layer; None if none was.
    """
    found = rates.get(rate(stream(kernel, problem), by))
    return bytes_of(kernel, problem) / found if found else None


def specs(arch: Arch, dtype: torch.dtype, rates: dict[str, float]) -> Device:
    """Return an architecture's specification with what was measured of one device in its place.

    rates: may lack the speeds of our GEMM's forms, which then are those that are assumed.
    """
    published = gpu_specs.device(arch)
    flops = max(rates.get(PRODUCT, 0.0), rates.get(SMALL_PRODUCT, 0.0))
    return published._replace(
        **({"full_flops" if dtype == torch.float32 else "half_flops": flops} if flops else {}),
        bandwidth=rates.get(COPY, published.bandwidth),
        tma_speed=rates.get("gemm_tma", published.tma_speed),
        pointers_speed=rates.get("gemm_pointers", published.pointers_speed),
    )

"""Functions that enter measurements, verdicts and failures into a record."""

from __future__ import annotations

import gc
import math
import traceback

import torch

from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.bench.measure.lower_bound import LowerBound
from lorafast.bench.measure.timing import median_interval, quantiles
from lorafast.bench.report.record import TIMES, Record
from lorafast.engine.error_rule import MAX_ERROR_RATIO
from lorafast.runtime import devices, env

# The fewest rounds whose median has a 95 % interval.
MIN_ROUNDS = 6


def set_error_ratio(record: Record, ratio: float, name: str, tokens: int) -> None:
    """Enter the worst error ratio, the name of its tensor and the tokens it was taken over."""
    record.error_ratio = ratio if math.isfinite(ratio) else None
    record.error_name, record.error_tokens = name, tokens
    if not ratio <= MAX_ERROR_RATIO:
        limit = f"at most {MAX_ERROR_RATIO:g} is right"
        record.fail("wrong", f"{name} errs {ratio:.3g} times what eager errs; {limit}")


def set_times(
    record: Record,
    phases: list[tuple[float, ...]],
    frozen: list[tuple[float, ...]] | None,
    warmup: int,
) -> None:
    """Enter the times of a record's rounds, and the ratio to the frozen step of the same round.

    phases, frozen: for each round, the milliseconds of each phase: forward and, in a training step,
        backward and the optimizer.
    """
    steps = [sum(sample) for sample in phases]
    values = {"fwd_ms": [sample[0] for sample in phases], "step_ms": steps}
    if len(phases[0]) > 1:
        values["bwd_ms"] = [sample[1] for sample in phases]
    if frozen and len(frozen) == len(steps):
        pairs = zip(steps, frozen, strict=True)
        values["ratio_to_frozen"] = [step / sum(base) for step, base in pairs]
        base = quantiles([sum(sample) for sample in frozen])
        record.frozen_spread = base.p80 / base.p20 if base.p20 else None
    for name in TIMES:
        if name in values:
            found = quantiles(values[name])
            setattr(record, name, found.p50)
            setattr(record, f"{name}_p20", found.p20)
            setattr(record, f"{name}_p80", found.p80)
    interval = median_interval(values.get("ratio_to_frozen", []))
    record.ratio_low, record.ratio_high = interval or (None, None)
    record.tokens_per_s = record.M / (record.step_ms / 1e3)
    record.rounds, record.warmup = len(steps), warmup


def set_lower_bound(record: Record, bound: LowerBound | None, bandwidth: float | None) -> None:
    """Enter the lower bound of the row's ratio, and the bandwidth used to compute it."""
    if bound is not None:
        record.fused_floor, record.floor = bound.fused, bound.separate
        record.bandwidth_bytes_per_s = bandwidth


def set_failure(record: Record, error: Exception, impl: Impl) -> None:
    """Enter why the row could not be measured.

    A defect makes the row wrong, like an error that is too large, and its traceback is printed.
    """
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Unavailable):
        record.fail(error.status, first)
    elif devices.is_out_of_memory(error):
        record.fail("oom", first or "out of memory")
    elif _is_unsupported(error, impl):
        record.fail("unsupported", f"{type(error).__name__}: {first}")
    else:
        traceback.print_exception(error)
        record.fail("wrong", f"raised {type(error).__name__}: {first}")
    # The traceback's frames hold tensors, whose memory the other rows need.
    error.__traceback__ = None


def _is_unsupported(error: Exception, impl: Impl) -> bool:
    """True if the exception says that the implementation does not support the problem.

    PEFT and compilers say so by many exceptions; lorafast by NotImplementedError, or by the reason
    why a forced backend cannot run.
    """
    if isinstance(error, NotImplementedError):
        return True
    if impl.base.startswith("peft") or impl.compile:
        return isinstance(error, RuntimeError | ValueError | TypeError | ImportError)
    return isinstance(error, RuntimeError) and env.backend() != "auto"


def free_memory(device: torch.device) -> None:
    """Return memory that nothing holds to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""What a measurement, a verdict or a failure makes of a row."""

from __future__ import annotations

import gc
import math
import traceback

import torch

from lorafast.bench import memory
from lorafast.bench.clock import interval, quantiles
from lorafast.bench.floor import Floor
from lorafast.bench.impl import Impl
from lorafast.bench.record import TIMES, Record
from lorafast.bench.refusal import Unable
from lorafast.runtime import env

# More than this, and a row is wrong: it shows no speed.
MAX_ERROR_RATIO = 2.0
# Of fewer rounds the median has no interval of 95 %.
LEAST_ROUNDS = 6


def judge(record: Record, ratio: float, name: str, tokens: int) -> None:
    """Enter the worst error ratio, of what, and over how many tokens."""
    record.error_ratio, record.error_name, record.error_tokens = (
        ratio if math.isfinite(ratio) else None,
        name,
        tokens,
    )
    if not ratio <= MAX_ERROR_RATIO:
        record.fail(
            "wrong",
            f"{name} errs {ratio:.3g} times what eager errs; at most {MAX_ERROR_RATIO:g} is right",
        )


def enter_times(
    record: Record,
    phases: list[tuple[float, ...]],
    frozen: list[tuple[float, ...]] | None,
    warmup: int,
) -> None:
    """Medians and percentiles of forward, backward, the whole step, and its ratio to the frozen one round by round, that with its
    interval.
    """
    steps = [sum(sample) for sample in phases]
    values = {
        "fwd_ms": [sample[0] for sample in phases],
        "bwd_ms": [sample[1] for sample in phases],
        "step_ms": steps,
    }
    if frozen and len(frozen) == len(steps):
        values["ratio_to_frozen"] = [
            step / sum(base) for step, base in zip(steps, frozen, strict=True)
        ]
    for name in TIMES:
        if name in values:
            found = quantiles(values[name])
            setattr(record, name, found.p50)
            setattr(record, f"{name}_p20", found.p20)
            setattr(record, f"{name}_p80", found.p80)
    record.ratio_low, record.ratio_high = interval(values.get("ratio_to_frozen", [])) or (
        None,
        None,
    )
    record.tokens_per_s = record.M / (record.step_ms / 1e3)
    record.rounds, record.warmup = len(steps), warmup


def enter_floor(record: Record, floor: Floor | None, bandwidth: float | None) -> None:
    """Enter what the row cannot get under, and the bandwidth that was reckoned with."""
    if floor is not None:
        record.fused_floor, record.floor, record.bandwidth_bytes_per_s = *floor, bandwidth


def fail(record: Record, error: Exception, impl: Impl) -> None:
    """Enter why it could not be measured; a defect of ours, or of the bench, is as wrong as a wrong figure, and told whole."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Unable):
        record.fail(error.status, first)
    elif memory.is_out_of_memory(error):
        record.fail("oom", first or "out of memory")
    elif _is_refusal(error, impl):
        record.fail("unsupported", f"{type(error).__name__}: {first}")
    else:
        traceback.print_exception(error)
        record.fail("wrong", f"raised {type(error).__name__}: {first}")
    # A traceback holds the tensors that had no room beside others.
    error.__traceback__ = None


def _is_refusal(error: Exception, impl: Impl) -> bool:
    """What a peer or a compiler raises is its way to say no. Ours says NotImplementedError, or why a forced backend cannot."""
    if isinstance(error, NotImplementedError):
        return True
    if impl.base.startswith("peft") or impl.compile:
        return isinstance(error, RuntimeError | ValueError | TypeError | ImportError)
    return isinstance(error, RuntimeError) and env.backend() != "auto"


def release(device: torch.device) -> None:
    """Give back what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

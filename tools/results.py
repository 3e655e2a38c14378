"""The records of bench/results, by what they measured, and their numbers as cells of a table."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
# The devices whose results the pages show, as a file's env names them: one with AVX-512 and bf16
# products, and one with AVX2 alone.
DEVICES = ("AMD EPYC, 2 threads", "AMD EPYC, 1 thread")
# The device of what has been measured since calls are made in C++: generation, quantised bases.
NEWER = ("AMD EPYC (avx512bf16), 2 threads", "AMD EPYC (avx512bf16), 1 thread")
# That of what is computed on tensors without values.
ESTIMATED = ("no device: estimated",)

Record = dict[str, Any]


@functools.cache
def records(devices: tuple[str, ...] = DEVICES) -> list[Record]:
    """Every record that was measured on one of the devices."""
    found: list[Record] = []
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        if document["env"]["device_name"] in devices:
            found += document["records"]
    return found


def measured(
    label: str, run: str, devices: tuple[str, ...] = DEVICES, **wanted: Any
) -> list[Record]:
    """The records of one implementation and method on one problem, one for each repetition.

    label: "frozen", or an implementation and a method such as "peft lora". run: the name of the run
    in the file's env; a record without one belongs to every run. devices: those that count. wanted:
    the fields that name the problem; a field that a record lacks counts as None. LookupError if
    nothing matches.
    """
    impl, _, method = label.partition(" ")
    wanted = {"impl": impl, "method": method or "none"} | wanted

    def matches(record: Record) -> bool:
        fits = ((record.get(key) or None) == (value or None) for key, value in wanted.items())
        return record.get("run", run) == run and all(fits)

    found = [record for record in records(devices) if matches(record)]
    if not found:
        raise LookupError(f"bench/results has no record of run {run!r} with {wanted}")
    return found


def median(found: list[Record], field: str, form: str = ".2f") -> str:
    """The median over runs of a field; the status of the runs if none of them has it."""
    values = [r[field] for r in found if r.get(field) is not None]
    if values:
        return format(statistics.median(values), form)
    return next((r["status"] for r in found if r.get("status", "ok") != "ok"), "–")


def highest(found: list[Record], field: str) -> str:
    """The largest value over runs of a field."""
    return f"{max(r[field] for r in found if r.get(field) is not None):.2f}"


def size(found: list[Record], field: str) -> str:
    """The median over runs of a count of bytes, with its unit."""
    count = statistics.median(r[field] for r in found if r.get(field) is not None)
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            break
        count /= 1024 if unit != "MiB" else 1
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def losses(found: list[Record]) -> str:
    """The mean loss of the first ten and the last ten steps."""
    kept = next(r["losses"] for r in found if r.get("losses"))
    return f"{statistics.fmean(kept[:10]):.2f} → {statistics.fmean(kept[-10:]):.2f}"

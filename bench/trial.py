"""lorafast-bench trial: the verdict on the kernels of a GPU, found or read, as tables."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import torch

from lorafast.bench.errors import BenchError
from lorafast.bench.report.record import SCHEMA_VERSION
from lorafast.bench.report.tables import NOTHING, Table
from lorafast.engine import trial
from lorafast.engine.trial_forms import Verdict

LEGEND = (
    "A form is right if its dropout bits are philox's, its error against float64 is at most twice "
    "stock torch's, two runs agree bit for bit, and it writes its outputs whole and nothing else.",
    "constants: bytes/s and flop/s as measured; those of the GEMM are its speed by torch's.",
)


def run(device: torch.device, entries: tuple[str, ...], again: bool) -> dict[str, Verdict]:
    """Return the verdict on each entry. BenchError if none of them can be tried there.

    One that cannot be tried has a reason and no forms. again: try anew what has a verdict.
    """
    since = time.time() if again else 0.0
    found = {}
    for entry in entries:
        verdict = trial.verdict(device, entry, since)
        # A Provisional is for a capture, and none is here.
        found[entry] = verdict if isinstance(verdict, Verdict) else Verdict(reason=verdict)
    if not any(verdict.forms for verdict in found.values()):
        reasons = dict.fromkeys(verdict.reason for verdict in found.values())
        raise BenchError(f"{device}: {'; '.join(reasons)}")
    return found


def tables(found: dict[str, Verdict]) -> list[Table]:
    """Return two tables for each entry: its forms, and the constants that were measured."""
    every = []
    for entry, verdict in found.items():
        forms = tuple(
            (form, "wrong" if reason else "right", reason or NOTHING)
            for form, reason in verdict.forms.items()
        )
        if not forms:
            every.append(
                Table(f"{entry}: not tried", ("reason",), ((verdict.reason,),), frozenset(), ())
            )
            continue
        title = f"{entry}: tried in {verdict.seconds:g} s"
        every.append(Table(title, ("form", "verdict", "reason"), forms, frozenset(), ()))
        rates = tuple((name, f"{rate:.4g}") for name, rate in verdict.rates.items())
        if rates:
            heads = ("constant", "measured")
            every.append(Table(f"{entry}: constants", heads, rates, frozenset(), ()))
    return every


def all_right(found: dict[str, Verdict]) -> bool:
    """True if every form is right, and every constant was measured."""
    return not any(reason for verdict in found.values() for reason in verdict.forms.values())


def document(facts: dict, found: dict[str, Verdict]) -> str:
    """Return everything as the text of a JSON file."""
    entries = {entry: asdict(verdict) for entry, verdict in found.items()}
    content = {"schema_version": SCHEMA_VERSION, "env": facts, "trial": entries}
    return json.dumps(content, indent=1) + "\n"

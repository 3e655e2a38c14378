"""One measured row, and the file rows live in: {"schema_version", "env", "records"}."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_type_hints

from lorafast.bench.refusal import Refused

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "wrong", "unsupported", "missing")
BENCHES = ("linear", "step", "training")
TIMES = ("fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen")
SPEEDS = (
    *(f"{time}{tail}" for time in TIMES for tail in ("", "_p20", "_p80")),
    "ratio_low",
    "ratio_high",
    "tokens_per_s",
)
# Keys that came after the first files; those that lack them are read all the same.
LATER = ("ratio_low", "ratio_high", "floor", "fused_floor", "bandwidth_bytes_per_s")


@dataclass
class Record:
    """One contender on one problem. Times are medians over rounds with their 20th and 80th percentiles; bytes are exact counts.

    bench: "linear" (one layer), "step" (a model's step at one batch size) or "training" (a model trained).
    ratio_low, ratio_high: the 95 % interval of the median of ratio_to_frozen, round by round.
    floor, fused_floor: no measurements; the least ratios to frozen by flops, and by bytes at bandwidth_bytes_per_s too (floor).
    saved_bytes: what autograd keeps beyond x and y; saved_by_reference: bytes of x and y it keeps, which live anyway.
    activation_bytes: alive at the end of forward, y included. peak_bytes: the most alive at once in a step, weights and x apart.
    error_ratio: max(e, f) ÷ max(e_eager, f), the worst over y and gradients (error_name); None is not measured, or not finite.
    """

    bench: str
    impl: str
    method: str
    device: str
    dtype: str
    seed: int
    M: int
    R: int
    dropout: float
    N: int | None = None
    K: int | None = None
    bias: bool | None = None
    adapter_dtype: str | None = None
    dropout_on: str | None = None
    compile: bool = False
    cuda_graph: bool = False
    checkpointing: bool = False
    route: str = "torch"
    status: str = "ok"
    reason: str | None = None
    fwd_ms: float | None = None
    fwd_ms_p20: float | None = None
    fwd_ms_p80: float | None = None
    bwd_ms: float | None = None
    bwd_ms_p20: float | None = None
    bwd_ms_p80: float | None = None
    step_ms: float | None = None
    step_ms_p20: float | None = None
    step_ms_p80: float | None = None
    ratio_to_frozen: float | None = None
    ratio_to_frozen_p20: float | None = None
    ratio_to_frozen_p80: float | None = None
    tokens_per_s: float | None = None
    rounds: int = 0
    warmup: int = 0
    saved_bytes: int | None = None
    saved_by_reference: dict | None = None
    activation_bytes: int | None = None
    peak_bytes: int | None = None
    error_ratio: float | None = None
    error_name: str | None = None
    error_tokens: int | None = None
    model: str | None = None
    batch_size: int | None = None
    seq: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    trainable: int | None = None
    weight_bytes: int | None = None
    grad_bytes: int | None = None
    optimizer_bytes: int | None = None
    losses: list | None = None
    accuracy: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    floor: float | None = None
    fused_floor: float | None = None
    bandwidth_bytes_per_s: float | None = None

    def fail(self, status: str, reason: str) -> Record:
        """This row as one that shows no speed."""
        self.status, self.reason = status, reason
        for name in SPEEDS:
            setattr(self, name, None)
        return self

    def loss_gap(self, other: Record) -> tuple[float, int]:
        """The largest distance of two trained rows' losses, and at which step."""
        return max(
            (abs(a - b), step)
            for step, (a, b) in enumerate(zip(self.losses, other.losses, strict=True))
        )

    @property
    def label(self) -> str:
        """impl and method, as tables and plots call the row."""
        return self.impl if self.method == "none" else f"{self.impl} {self.method}"


KEYS = tuple(field.name for field in fields(Record))


class Results:
    """The environment and the rows measured in it."""

    def __init__(self, env: dict, records: list[Record]) -> None:
        self.env, self.records = env, records

    def document(self) -> dict:
        """As JSON holds it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "env": self.env,
            "records": [asdict(record) for record in self.records],
        }

    def write(self, path: Path) -> None:
        """Whole or not at all; a link stays a link, and what is no regular file (a pipe, /dev/stdout) is written to plainly."""
        text = json.dumps(self.document(), indent=1, allow_nan=False) + "\n"
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def read(cls, path: Path) -> Results:
        """Refused, naming the file and what in it is not of the schema."""
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        except ValueError as error:  # JSON's and the encoding's
            raise Refused(f"{path}: not JSON: {error}") from error
        if wrong := faults(document):
            raise Refused(f"{path}: " + "; ".join(wrong[:5]) + ("; …" if len(wrong) > 5 else ""))
        return cls(document["env"], [Record(**record) for record in document["records"]])


def faults(document: object) -> list[str]:
    """Everything in which a document departs from the schema; empty if it keeps to it."""
    if not isinstance(document, dict) or set(document) != {"schema_version", "env", "records"}:
        return ["must hold schema_version, env and records"]
    if document["schema_version"] != SCHEMA_VERSION:
        return [f"schema_version {document['schema_version']!r} is not {SCHEMA_VERSION}"]
    if not isinstance(document["env"], dict) or not isinstance(document["records"], list):
        return ["env must be an object and records a list"]
    return [
        f"records[{i}]: {fault}"
        for i, record in enumerate(document["records"])
        for fault in _faults_of(record)
    ]


def _faults_of(record: object) -> list[str]:
    if not isinstance(record, dict):
        return ["is no object"]
    wrong = [f"{name} is missing" for name in KEYS if name not in record and name not in LATER] + [
        f"{name} is unknown" for name in record if name not in KEYS
    ]
    if wrong:
        return wrong
    for name, hint in get_type_hints(Record).items():
        if name in record and not _fits(record[name], hint):
            wrong.append(f"{name} is {record[name]!r}")
    if record["bench"] not in BENCHES:
        wrong.append(f"bench is {record['bench']!r}")
    if record["status"] not in STATUSES:
        wrong.append(f"status is {record['status']!r}")
    elif record["status"] != "ok":
        wrong += [
            f"{name} is shown, status is {record['status']}"
            for name in SPEEDS
            if record.get(name) is not None
        ]
        wrong += [] if record["reason"] else [f"status is {record['status']} without a reason"]
    return wrong


def _fits(value: object, hint: type | UnionType) -> bool:
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return (
        isinstance(value, tuple(kinds))
        or (isinstance(value, int) and float in kinds)
        or (value is None and NoneType in kinds)
    )

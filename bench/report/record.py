"""One measured row, and the JSON file of rows: {"schema_version", "env", "records"}."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_type_hints

from lorafast.bench.errors import BenchError
from lorafast.runtime import whole_file

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "wrong", "unsupported", "missing")
BENCHES = ("linear", "step", "training", "generate", "experts", "block", "estimate")
TIMES = ("fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen")
SPEEDS = (
    *(f"{time}{tail}" for time in TIMES for tail in ("", "_p20", "_p80")),
    "ratio_low",
    "ratio_high",
    "tokens_per_s",
    "frozen_spread",
)
# Keys that were added after the first files were written. A file may lack them.
LATER = (
    *("ratio_low", "ratio_high", "floor", "fused_floor", "bandwidth_bytes_per_s", "run"),
    *("frozen_spread", "inference", "base_format", "experts", "top_k", "routing"),
    *("head_bytes", "total_bytes", "modelled_ms", "largest_batch", "card_bytes"),
    *("measured_peak_bytes", "weight_formats"),
)
# A machine is busy if the frozen step's time scatters more than this: its p80 ÷ its p20.
MAX_FROZEN_SPREAD = 1.5


@dataclass
class Record:
    """One candidate on one problem.

    Times are medians over rounds, with their 20th and 80th percentiles. Bytes are exact counts.

    bench: "linear" (one layer), "block" (one block of a model), "step" (a model's step at one batch
        size), "training", "generate" (M new tokens after a prompt of seq, whose time is step_ms),
        "experts" (one layer of experts, of which each of M tokens gets top_k), or "estimate" (a
        step on tensors without values, whose device is the name of a card).
    ratio_low, ratio_high: the 95 % interval of the median of ratio_to_frozen over rounds.
    frozen_spread: the 80th percentile of the frozen step's time over its 20th, in the same rounds.
    floor, fused_floor: computed lower bounds of ratio_to_frozen: by flops and by bytes at
        bandwidth_bytes_per_s (floor), and by flops alone (fused_floor).
    saved_bytes: what autograd keeps besides x and y.
    saved_by_reference: bytes of x and y that autograd keeps, which are alive in any case.
    activation_bytes: alive at the end of forward, y included.
    peak_bytes: the most that is alive at once in a step, besides weights and x.
    error_ratio: max(e, f) / max(e_eager, f), the worst over y and the gradients (error_name). None
        if it is not measured or not finite.
    inference: the row is a forward in eval mode without gradients, and step_ms its time.
    base_format: how the base's linears hold their weights: "dense", or a format that quantises.
    routing: how the rows are distributed over experts: "balanced", "skewed" or "empty".
    head_bytes: of an estimate's activations, those of the head and the loss.
    total_bytes: weights, optimizer's state and peak of an estimate.
    modelled_ms: the modelled time of an estimate's step; nothing is measured.
    largest_batch: the most texts whose step fits card_bytes; 0 if not one does.
    weight_formats: bytes of an estimate's weights by the format of its frozen linears.
    measured_peak_bytes: peak_bytes of the same step taken on this machine.
    run: in a compact file, the key of env["runs"] that names the commit and the command.
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
    run: str | None = None
    frozen_spread: float | None = None
    inference: bool = False
    base_format: str = "dense"
    experts: int | None = None
    top_k: int | None = None
    routing: str | None = None
    head_bytes: int | None = None
    total_bytes: int | None = None
    modelled_ms: float | None = None
    largest_batch: int | None = None
    card_bytes: int | None = None
    measured_peak_bytes: int | None = None
    weight_formats: dict | None = None

    @property
    def busy(self) -> bool:
        """True if other work on the machine makes the row's times doubtful."""
        return self.frozen_spread is not None and self.frozen_spread > MAX_FROZEN_SPREAD

    @property
    def ok(self) -> bool:
        """True if the row is measured and right."""
        return self.status == "ok"

    @property
    def label(self) -> str:
        """Implementation and method, as notes and complaints name the row."""
        name = self.impl if self.method == "none" else f"{self.impl} {self.method}"
        return name if self.base_format == "dense" else f"{name} on {self.base_format}"

    @property
    def model_name(self) -> str | None:
        """The model with its base's format, as titles name it; None for one layer."""
        return self.model if self.base_format == "dense" else f"{self.model} in {self.base_format}"

    def fail(self, status: str, reason: str) -> Record:
        """Make this row one without a speed, and return it."""
        self.status, self.reason = status, reason
        for name in SPEEDS:
            setattr(self, name, None)
        return self

    def loss_gap(self, other: Record) -> tuple[float, int]:
        """Return the largest difference between two rows' losses, and its step."""
        pairs = zip(self.losses, other.losses, strict=True)
        return max((abs(a - b), step) for step, (a, b) in enumerate(pairs))


KEYS = tuple(field.name for field in fields(Record))
_REQUIRED_OF_COMPACT = KEYS[: KEYS.index("dropout") + 1]


class Results:
    """The environment, and the rows measured in it."""

    def __init__(self, env: dict, records: list[Record]) -> None:
        self.env, self.records = env, records

    def document(self) -> dict:
        """Return the content of the JSON file."""
        records = [asdict(record) for record in self.records]
        for record in records:
            if record["run"] is None:
                del record["run"]
        return {"schema_version": SCHEMA_VERSION, "env": self.env, "records": records}

    def text(self) -> str:
        """Return the text of the JSON file."""
        return json.dumps(self.document(), indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all.

        A symbolic link stays one. A path that is no regular file, such as a pipe or /dev/stdout, is
        written to directly.
        """
        text = self.text()
        path = path.resolve()
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        whole_file.write(path, text, 0o644)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file. BenchError, with the path and the faults, if it departs from the schema."""
        try:
            document = json.loads(path.read_text())
        except OSError as error:
            raise BenchError(f"{path}: {error.strerror}") from error
        except ValueError as error:  # of JSON, or of the text encoding
            raise BenchError(f"{path}: not JSON: {error}") from error
        if wrong := faults(document):
            more = "; …" if len(wrong) > 5 else ""
            raise BenchError(f"{path}: {'; '.join(wrong[:5])}{more}")
        return cls(document["env"], [Record(**record) for record in document["records"]])


def faults(document: object) -> list[str]:
    """Return every departure of a document from the schema; empty if there is none."""
    if not isinstance(document, dict) or set(document) != {"schema_version", "env", "records"}:
        return ["must hold schema_version, env and records"]
    if document["schema_version"] != SCHEMA_VERSION:
        return [f"schema_version {document['schema_version']!r} is not {SCHEMA_VERSION}"]
    env, records = document["env"], document["records"]
    if not isinstance(env, dict) or not isinstance(records, list):
        return ["env must be an object and records a list"]
    runs = env.get("runs")
    if runs is not None and not isinstance(runs, dict):
        return ["env's runs must be an object"]
    return [
        f"records[{i}]: {fault}"
        for i, record in enumerate(records)
        for fault in _faults(record, runs)
    ]


def _faults(record: object, runs: dict | None) -> list[str]:
    """Return the departures of one record. runs: those of a compact file's env."""
    if not isinstance(record, dict):
        return ["is no object"]
    if runs is None:
        required = [name for name in KEYS if name not in LATER]
    else:
        required = [*_REQUIRED_OF_COMPACT, "run"]
    wrong = [f"{name} is missing" for name in required if name not in record]
    wrong += [f"{name} is unknown" for name in record if name not in KEYS]
    if wrong:
        return wrong
    for name, hint in get_type_hints(Record).items():
        if name in record and not _fits(record[name], hint):
            wrong.append(f"{name} is {record[name]!r}")
    if record["bench"] not in BENCHES:
        wrong.append(f"bench is {record['bench']!r}")
    if record.get("run") not in (runs or (None,)):
        wrong.append(f"run {record['run']!r} is none of env's runs")
    return wrong + _status_faults(record)


def _status_faults(record: dict) -> list[str]:
    status = record.get("status", "ok")
    if status not in STATUSES:
        return [f"status is {status!r}"]
    if status == "ok":
        return []
    shown = [name for name in SPEEDS if record.get(name) is not None]
    wrong = [f"{name} is shown, status is {status}" for name in shown]
    if not record.get("reason"):
        wrong.append(f"status is {status} without a reason")
    return wrong


def _fits(value: object, hint: type | UnionType) -> bool:
    """True if a JSON value has the annotated type; whole numbers count as floats too."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return (
        isinstance(value, tuple(kinds))
        or (isinstance(value, int) and float in kinds)
        or (value is None and NoneType in kinds)
    )

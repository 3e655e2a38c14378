"""Compact files: several runs on one device in one file, with one line per record.

    python -m lorafast.bench.report.compact OUT.json NAME=RUN.json[,RUN.json…] …

env["runs"] has the commit, the command and the time of every NAME, and each record names its run.
Several files of one NAME are repeats of one command and become one record per row: the median of
every measured number, the lowest ratio_low and the highest ratio_high. Rows that could not be
measured are left out, and so are keys that have their default.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from lorafast.bench.errors import BenchError
from lorafast.bench.report.record import SCHEMA_VERSION, Record, Results

# Significant digits of floats. Counts of bytes are exact.
DIGITS = 4
# The facts of the environment that belong to a run.
RUN_FACTS = ("commit", "command", "time")
# Keys that no table and no figure shows, and tokens_per_s, which follows from M and step_ms.
_LEFT_OUT = (
    *(f"{phase}_ms_{tail}" for phase in ("fwd", "bwd", "step") for tail in ("p20", "p80")),
    *("bandwidth_bytes_per_s", "error_name", "error_tokens", "grad_bytes", "tokens_per_s"),
    *("warmup", "weight_bytes", "weight_formats"),
)


def compact(runs: dict[str, list[Results]]) -> str:
    """Return the text of a compact file. runs: for each name, a run or the repeats of one.

    Raises BenchError if their environments differ, or the commands of repeats.
    """
    facts, records = {}, []
    machines = [_machine(one) for repeats in runs.values() for one in repeats]
    if any(machine != machines[0] for machine in machines):
        raise BenchError("the files were measured in different environments")
    for name, repeats in runs.items():
        facts[name] = _run_facts(name, repeats)
        # Losses are compared with those of PEFT, from which they differ in the sixth digit.
        exact = {r.method for r in repeats[0].records if r.impl == "peft"}
        records += [_record(name, rows, exact) for rows in _rows(name, repeats)]
    env = json.dumps(machines[0] | {"runs": facts}, indent=1)
    lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in records)
    head = f'"schema_version": {SCHEMA_VERSION},\n"env": {env},\n"records": ['
    return f"{{\n{head}\n{lines}\n]\n}}\n"


def _machine(results: Results) -> dict:
    return {key: value for key, value in results.env.items() if key not in RUN_FACTS}


def _run_facts(name: str, repeats: list[Results]) -> dict:
    """Return commit, command and time of a run; for repeats, a list of their times."""
    facts = [{key: one.env[key] for key in RUN_FACTS} for one in repeats]
    times = [one.pop("time") for one in facts]
    if any(one != facts[0] for one in facts):
        raise BenchError(f"{name}: its files differ in commit or command")
    return facts[0] | {"time": times[0] if len(times) == 1 else times}


def _rows(name: str, repeats: list[Results]) -> list[tuple[Record, ...]]:
    """Return every measured row with its repeats."""
    if len({len(one.records) for one in repeats}) > 1:
        raise BenchError(f"{name}: its files differ in their number of rows")
    rows = zip(*(one.records for one in repeats), strict=True)
    return [row for row in rows if row[0].status not in ("missing", "unsupported")]


def _record(name: str, repeats: tuple[Record, ...], exact_losses: set[str]) -> dict:
    """Return a record of the compact file for one row."""
    found = {"run": name}
    for field in dataclasses.fields(Record):
        values = [getattr(one, field.name) for one in repeats]
        if field.name in _LEFT_OUT or field.name == "run" or values[0] == field.default:
            continue
        value = _joined(field.name, values)
        if field.name != "losses" or repeats[0].method not in exact_losses:
            value = _rounded(value)
        found[field.name] = value
    return found


def _joined(name: str, values: list) -> object:
    """Return one value for those of all repeats."""
    if all(value == values[0] for value in values):
        return values[0]
    if not all(isinstance(value, float) for value in values):
        raise BenchError(f"repeats differ in {name}: {', '.join(map(str, values))}")
    if name in ("ratio_low", "ratio_high"):
        return min(values) if name == "ratio_low" else max(values)
    return statistics.median(values)


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main(arguments: list[str]) -> None:
    """Write a compact file and check that it keeps to the schema."""
    out, *words = arguments
    runs = {}
    for word in words:
        name, _, files = word.partition("=")
        runs[name] = [Results.read(Path(file)) for file in files.split(",")]
    Path(out).write_text(compact(runs))
    Results.read(Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])

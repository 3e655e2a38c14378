"""The child process of a trial: started, watched, ended, and what it reports.

The child appends a line of JSON to a file before and after each step, so that the step that was
running is known when it crashes or hangs. A child that dies is started again for the steps that are
left.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lorafast.runtime import env

# The time of all children of one trial together for the steps of one entry, in seconds.
LIMIT = 120.0
# A test puts a program here that stands in for the child.
COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "lorafast.engine.trial_checks")
# The seconds that a child may take to end once it is killed: its driver may hold it longer.
_GRACE = 10.0
_MOST_CHARACTERS = 300


class Outcome(NamedTuple):
    """The end of a trial.

    reasons: of each step why it does not serve, "" if it does. rates: what a step measured.
    unusable: why the child could not begin, "" if it could.
    """

    reasons: dict[str, str]
    rates: dict[str, dict[str, float]]
    unusable: str = ""


class Report:
    """The file of a trial: the steps to do, those that ended, and the one that runs.

    A line is {"steps": […]}, {"begin": step}, {"end": step, "reason": "…", "rates": {…}} or
    {"unusable": "…"}.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[str] = []
        self.reasons: dict[str, str] = {}
        self.rates: dict[str, dict[str, float]] = {}
        self.running: str | None = None
        self.unusable = ""
        for line in path.read_text().splitlines():
            # A child that is killed may leave half a line, of a step that did not end.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                self._add(json.loads(line))

    def _add(self, said: dict) -> None:
        if "begin" in said:
            self.running = said["begin"]
        elif "end" in said:
            self.reasons[said["end"]], self.running = said["reason"], None
            if said.get("rates"):
                self.rates[said["end"]] = said["rates"]
        elif "steps" in said:
            self.steps = said["steps"]
        else:
            self.unusable = said["unusable"]

    @property
    def left(self) -> list[str]:
        """The steps that have not ended."""
        return [step for step in self.steps if step not in self.reasons]

    def give_up(self, steps: list[str], why: str) -> None:
        """End those of some steps that are left."""
        for step in steps:
            if step in self.left:
                self.write(end=step, reason=f"was not tried: {why}")

    def write(self, **said: object) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(said)}\n")


def run(uuid: str, steps: dict[str, list[str]], folder: Path, in_cpp: bool) -> Outcome:
    """Run children until every step has ended, or the time of its entry is up.

    uuid: the device. steps: those of each entry, in order. folder: where a temporary file may lie.
    in_cpp: launches are made by csrc/launch, which is there; else by Python, and nothing is built.
    """
    entry_of = {step: entry for entry, own in steps.items() for step in own}
    timed, end = next(iter(steps)), time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory(prefix="trial-", dir=folder) as inside:
        path = Path(inside) / "report.jsonl"
        path.touch()
        Report(path).write(steps=[*entry_of])
        ended = 0
        while True:
            why = _run_child(uuid, [*steps], path, end - time.monotonic(), in_cpp)
            report, late = Report(path), time.monotonic() >= end
            running = report.running
            if running is not None and not (late and entry_of[running] != timed):
                report.write(end=running, reason=why or "the child ended in it")
                report = Report(path)
            if not report.reasons:
                return Outcome({}, {}, report.unusable or why or "the child reports nothing")
            if report.unusable or (len(report.reasons) == ended and not late):
                # What was found before a device became unusable is kept.
                report.give_up(report.left, report.unusable or why)
            elif late and entry_of[running or (report.left or report.steps)[0]] == timed:
                report.give_up(steps[timed], "the time was up")
            report = Report(path)
            if not report.left:
                return Outcome(report.reasons, report.rates)
            if late:
                # An entry has the same time, however long the one before it took or hung.
                timed, end = entry_of[report.left[0]], time.monotonic() + LIMIT
            ended = len(report.reasons)


def _run_child(uuid: str, entries: list[str], report: Path, seconds: float, in_cpp: bool) -> str:
    """Run one child and return why it ended, in words; "" if it ended as it should."""
    command = [*COMMAND, "--device", uuid, "--entries", ",".join(entries), "--out", str(report)]
    with (report.parent / "stderr").open("w+b") as stderr:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                env=_environment(in_cpp), start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError, TypeError) as error:
            return f"the child cannot be started: {error}"
        try:
            status = child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return f"did not end within {LIMIT:g} s"
        finally:
            # Also on Ctrl-C, and with the compilers that it may have started.
            _kill(child)
        stderr.seek(0)
        return _why(status, stderr.read().decode(errors="replace"))


def _environment(in_cpp: bool) -> dict[str, str]:
    """The environment of a child: it imports what this process imports, and tries nothing itself.

    cuBLAS repeats its results only with a workspace of its own.
    """
    return env.child(
        PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        **{env.TRIAL.name: "0", env.BACKEND.name: "auto", env.HOST.name: "1" if in_cpp else "0"},
    )


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)


def _why(status: int, stderr: str) -> str:
    if not status:
        return ""
    # Not what is said of a kernel that is compiled.
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if not line.startswith("lorafast: ")), "")
    said = f": {' '.join(last.split())[:_MOST_CHARACTERS]}" if last else ""
    if status > 0:
        return f"crashed with status {status}{said}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    killed = ", as by a system without memory" if name == "SIGKILL" else ""
    return f"crashed by {name}{killed}{said}"

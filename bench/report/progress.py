"""The progress of a run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

# The steps whose mean time predicts that of the rest; before, a line gives no time.
_STEPS_TO_PREDICT = 3
# Rounds that take less than this many seconds are not announced.
_SHORT = 5.0


class Progress:
    """Steps out of a total, shown on stderr, so that stdout has the results alone."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._total, self._done, self._what = total, 0, ""
        self._began = time.monotonic()
        self._bar = None
        if self._console.is_terminal:
            description = TextColumn("{task.description}")
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            columns = (BarColumn(), MofNCompleteColumn(), *times, description)
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """Show the next step, in a pipe with the time that the rest takes by those before."""
        self._what = what
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=what)
        else:
            self._print(f"[{self._done + 1}/{self._total}] {what}{self._prediction()}")
        self._done += 1

    def rounds(self, count: int, seconds: float) -> None:
        """Say how long the rounds of the current step will take, if that is long."""
        if seconds < _SHORT:
            return
        expected = f"{count} rounds, about {duration(seconds)}"
        if self._bar:
            self._bar.update(self._task, description=f"{self._what}: {expected}")
        else:
            self._print(f"    {expected}")

    def _prediction(self) -> str:
        if self._done < _STEPS_TO_PREDICT:
            return ""
        spent = time.monotonic() - self._began
        left = spent / self._done * (self._total - self._done)
        return f" ({duration(spent)} so far, about {duration(left)} left)"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Return whole seconds, such as "40 s", or minutes, such as "3 min"."""
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"

"""The progress of a run: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Steps out of a total, shown on stderr, so that stdout has the results alone."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._total, self._done = total, 0
        self._bar = None
        if self._console.is_terminal:
            description = TextColumn("{task.description}")
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), description)
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
        """Show the next step."""
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=what)
        else:
            line = f"[{self._done + 1}/{self._total}] {what}"
            self._console.print(line, markup=False, highlight=False)
        self._done += 1

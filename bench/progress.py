"""How far a run is: a bar on a terminal, plain lines into a pipe."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Steps out of a total, told on stderr so that stdout keeps to the results."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._total, self._done = total, 0
        self._bar = None
        if self._console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
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
        """Clear the bar away."""
        if self._bar:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """What is being done now, as the next step."""
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=what)
        else:
            self._console.print(
                f"[{self._done + 1}/{self._total}] {what}", markup=False, highlight=False
            )
        self._done += 1

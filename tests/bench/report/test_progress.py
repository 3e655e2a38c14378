"""The progress bar; the plain lines are tested with lorafast-bench linear."""

import io

from rich.console import Console

from lorafast.bench.report import progress as progress_module
from lorafast.bench.report.progress import Progress, duration


def test_a_terminal_gets_a_bar_and_no_lines():
    file = io.StringIO()
    with Progress(2, Console(file=file, force_terminal=True, width=80)) as progress:
        progress.begin("one")
        progress.begin("two")
    assert "[1/2]" not in file.getvalue()
    assert "1/2" in file.getvalue() or "two" in file.getvalue()


def lines_in_a_pipe(do):
    file = io.StringIO()
    with Progress(9, Console(file=file, width=80, soft_wrap=True)) as progress:
        do(progress)
    return file.getvalue().splitlines()


def test_from_the_fourth_step_on_a_line_says_how_long_the_rest_takes(monkeypatch):
    times = iter([100.0, 160.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(times))

    def four_steps(progress):
        for name in "abcd":
            progress.begin(name)

    lines = lines_in_a_pipe(four_steps)
    assert lines[:3] == ["[1/9] a", "[2/9] b", "[3/9] c"]
    assert lines[3] == "[4/9] d (60 s so far, about 2 min left)"


def test_long_rounds_are_announced():
    def short_and_long(progress):
        progress.begin("a")
        progress.rounds(15, 0.5)
        progress.begin("b")
        progress.rounds(15, 40.0)

    assert lines_in_a_pipe(short_and_long) == ["[1/9] a", "[2/9] b", "    15 rounds, about 40 s"]


def test_durations():
    assert [duration(s) for s in (0.2, 99.4, 99.6, 3600)] == ["0 s", "99 s", "2 min", "60 min"]

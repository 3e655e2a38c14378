"""The progress bar; the plain lines are tested with lorafast-bench linear."""

import io

from rich.console import Console

from lorafast.bench.report.progress import Progress


def test_a_terminal_gets_a_bar_and_no_lines():
    file = io.StringIO()
    with Progress(2, Console(file=file, force_terminal=True, width=80)) as progress:
        progress.begin("one")
        progress.begin("two")
    assert "[1/2]" not in file.getvalue()
    assert "1/2" in file.getvalue() or "two" in file.getvalue()

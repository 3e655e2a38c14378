"""The tables of docs/modelled-steps.md: what they promise; they and the counts are up to date."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "modelled_steps.py"
PAGE = (ROOT / "docs" / "modelled-steps.md").read_text()
ROW = re.compile(r"^\| (LoRA|DoRA|LaMDA) \| (\S+) \| (.+) \|$", re.M)


class Row(NamedTuple):
    """The ratios of one row: by what auto chooses, eager and the cuda backend, and PEFT's."""

    chosen: float
    eager: float
    cuda: float
    theirs: list[float]


def tables():
    """The cells of every row, by (tokens, K, method, dropout)."""
    found = {}
    for head in re.finditer(
        r"^(\d+) tokens, (\d+) → \d+; (.*?)(?=^\d+ tokens|\Z)", PAGE, re.M | re.S
    ):
        for method, p, cells in ROW.findall(head[3]):
            _, eager, chosen, cuda, *theirs = cells.split(" | ")[:6]
            found[int(head[1]), int(head[2]), method, p] = Row(
                float(chosen), float(eager), float(cuda),
                [float(cell) for cell in theirs if cell != "–"],
            )  # fmt: skip
    return found


def test_nothing_chosen_is_modelled_above_peft_or_eager():
    rows = tables()
    assert len(rows) == 4 * 6
    for key, row in rows.items():
        assert row.chosen <= min([row.eager, *row.theirs]), key


def test_with_dropout_the_cuda_backend_is_modelled_below_peft_and_eager():
    rows = {key: row for key, row in tables().items() if key[-1] != "0"}
    assert len(rows) == 4 * 3
    for key, row in rows.items():
        assert row.cuda < min([row.eager, *row.theirs]), key


@pytest.mark.parametrize(("method", "most"), [("LoRA", 1.15), ("DoRA", 1.30)])
def test_cuda_with_dropout_at_4096_is_modelled_within_a_limit(method, most):
    """The limit is what it is modelled at today; DoRA's goal is 1.22."""
    assert tables()[8192, 4096, method, "0.05"].cuda <= most


@pytest.mark.parametrize(("method", "most"), [("LoRA", 1.25), ("DoRA", 1.35)])
def test_dropout_at_4096_is_modelled_within_the_goal(method, most):
    assert tables()[8192, 4096, method, "0.05"].chosen <= most


@pytest.mark.slow
@pytest.mark.peft
def test_the_page_is_what_the_tool_writes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, TOOL, "--print"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    made = PAGE.partition("<!-- modelled: begin -->\n\n")[2].partition("\n<!-- modelled: end -->")[
        0
    ]
    again = "run python tools/modelled_steps.py"
    counts = (ROOT / "kernels" / "loop_counts.py").read_text()
    assert done.stdout.startswith(counts), again
    assert done.stdout.removeprefix(counts).strip() == made.strip(), again

"""Kernels with a barrier, a wait or a fence taken out of their PTX, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from emulator import driver, machine
from emulator.memory import Fault

STATEMENTS = {
    "barrier": r"^\s*bar\.sync\s+0;$",
    "wait of cp.async": r"^\s*cp\.async\.wait_group\s+\d+;$",
    "commit of cp.async": r"^\s*cp\.async\.commit_group;$",
    "wait at an mbarrier": r"^\s*@!complete bra\.uni waitLoop;$",
    "expected bytes": r"^\s*@%p\d+ mbarrier\.arrive\.expect_tx[^\n]*;$",
    "wait of wgmma": r"^\s*wgmma\.wait_group[^\n]*;$",
    "fence": r"^\s*fence\.proxy[^\n]*;$",
    "wait of TMA stores": r"^\s*cp\.async\.bulk\.wait_group\.read[^\n]*;$",
}


class Tried(NamedTuple):
    """One mutant: the statement taken out, its line, and what came of it.

    fault: the Fault in words, None if there was none. right: True if the results were right.
    """

    statement: str
    line: int
    fault: str | None
    right: bool

    @property
    def seen(self) -> bool:
        """True if a fault or a wrong result tells the mutant from the kernel."""
        return self.fault is not None or not self.right


def mutants(text: str) -> Iterator[tuple[str, int, str]]:
    """Yield the PTX without each statement: its name, its line and the text."""
    for name, pattern in STATEMENTS.items():
        for match in re.finditer(pattern, text, re.M):
            line = text.count("\n", 0, match.start())
            yield name, line, text[: match.start()] + text[match.end() :]


def tried(run: Callable[[], bool], kernel: str, capability: int) -> list[Tried]:
    """Run every mutant of a kernel.

    run: launches the kernel among others and returns True if the results are right. It is called
    within driver.emulating(capability).
    """
    assert run()
    code = driver.of(capability).utils.latest[kernel]
    original, outcomes = dict(vars(code)), []
    for name, line, changed in mutants(code.text):
        vars(code).update(vars(machine.Code(changed)))
        fault, right = None, False
        try:
            right = run()
        except Fault as error:
            fault = str(error)
        outcomes.append(Tried(name, line, fault, right))
    vars(code).update(original)
    return outcomes

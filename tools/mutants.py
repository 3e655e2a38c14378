"""Small faults, planted one at a time in a copy of the checkout: a test must fail for each of them.

    python tools/mutants.py                 all of them; exit status 1 if one survives
    python tools/mutants.py --list          their numbers, names and files
    python tools/mutants.py --only 3,17     these alone, by number
    python tools/mutants.py --only csrc     those of one list, by the name of its file
    python tools/mutants.py --jobs 2        two at a time

A mutant is a file, a text that occurs in it once, the text that takes its place, and the tests of
which one must fail then. The lists are the TOML files in tools/mutants; a test checks that every
text still occurs once, so that no list goes stale unseen.

The tests run without any mutant first: a test that fails anyway would notice everything.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tools" / "mutants"
# A mutant may turn a loop into an endless one, which counts as noticed.
SECONDS = 900
IGNORED = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "results")
# The exit statuses of pytest.
PASSED, FAILED = 0, 1


class Mutant(NamedTuple):
    """One fault: the text `old` of `file` becomes `new`, and one of `tests` must fail."""

    group: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def check(self, checkout: Path) -> None:
        """Raise SystemExit unless the text occurs once in the checkout's file."""
        count = (checkout / self.file).read_text().count(self.old)
        if count != 1:
            raise SystemExit(
                f"{self.group}: {self.name}: the text occurs {count} times in {self.file}"
            )

    def apply(self, checkout: Path) -> None:
        """Write the fault into a checkout."""
        path = checkout / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


class Verdict(NamedTuple):
    """What became of a mutant: `killed`, `survived` or `broken` (no test ran), and the evidence."""

    outcome: str
    detail: str
    seconds: float


def read(folder: Path = LISTS) -> list[Mutant]:
    """Every mutant of every list in a folder, in the order of the files' names."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        for fields in tomllib.loads(path.read_text())["mutant"]:
            tests = tuple(fields.pop("tests"))
            mutants.append(Mutant(path.stem, **fields, tests=tests))
    return mutants


def run_tests(checkout: Path, arguments: Iterable[str], cache: Path) -> Verdict:
    """Run pytest in a checkout until the first failure."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        # Two texts of one length written within a second would share their byte code.
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORAFAST_CACHE": str(cache),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Verdict("killed", f"no end after {SECONDS} s", time.monotonic() - begin)
    seconds = time.monotonic() - begin
    lines = done.stdout.splitlines()
    if done.returncode == PASSED:
        return Verdict("survived", lines[-1], seconds)
    failures = [line for line in lines if line.startswith("FAILED")]
    if done.returncode == FAILED and failures:
        return Verdict("killed", failures[0].partition(" - ")[0].removeprefix("FAILED "), seconds)
    if done.returncode < 0:
        return Verdict("killed", f"pytest died of signal {-done.returncode}", seconds)
    return Verdict("broken", "\n".join([*lines[-12:], done.stderr[-2000:]]).strip(), seconds)


def copy_of(root: Path, folder: Path) -> Path:
    """A copy of a checkout, symlinks as symlinks."""
    copy = folder / "checkout"
    shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    return copy


def judge(mutant: Mutant, root: Path, cache: Path) -> Verdict:
    """Run the tests of a mutant in a copy that holds it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = copy_of(root, Path(folder))
        mutant.apply(copy)
        return run_tests(copy, mutant.tests, cache)


def judge_all(mutants: list[Mutant], root: Path = ROOT, jobs: int = 1) -> dict[Mutant, Verdict]:
    """The verdict on every mutant, printed as it comes.

    Raises SystemExit if the tests fail without a mutant.
    """
    for mutant in mutants:
        mutant.check(root)
    verdicts: dict[Mutant, Verdict] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # What the C++ of a mutant compiles to must not be found by anything else.
        cache = Path(folder) / "cache"
        plain = copy_of(root, Path(folder))
        tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
        verdict = run_tests(plain, tests, cache)
        if verdict.outcome != "survived":
            raise SystemExit(f"without a mutant: {verdict.detail}")
        print(f"without a mutant: {verdict.detail}", flush=True)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(judge, mutant, root, cache): mutant for mutant in mutants}
            for future in concurrent.futures.as_completed(running):
                mutant, verdict = running[future], future.result()
                verdicts[mutant] = verdict
                print(
                    f"{verdict.outcome:8} {verdict.seconds:5.0f} s  {mutant.group}: {mutant.name}"
                    f"  ({verdict.detail})",
                    flush=True,
                )
    return verdicts


def chosen(mutants: list[Mutant], only: str | None) -> list[Mutant]:
    """The mutants that --only names: numbers as --list prints them, or a list's name."""
    if only is None:
        return mutants
    if not only.replace(",", "").isdigit():
        found = [mutant for mutant in mutants if mutant.group == only]
    else:
        found = [mutants[int(number) - 1] for number in only.split(",")]
    if not found:
        raise SystemExit(f"--only {only}: no such mutant")
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command. Return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", help="numbers, comma-separated, or the name of a list")
    parser.add_argument("--jobs", type=int, default=1, help="mutants judged at a time")
    options = parser.parse_args(arguments)
    mutants = read()
    if options.list:
        for number, mutant in enumerate(mutants, 1):
            print(f"{number:3}  {mutant.group}: {mutant.name}  [{mutant.file}]")
        return 0
    verdicts = judge_all(chosen(mutants, options.only), jobs=options.jobs)
    left = [mutant for mutant, verdict in verdicts.items() if verdict.outcome != "killed"]
    print(f"{len(verdicts) - len(left)} of {len(verdicts)} mutants were noticed")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())

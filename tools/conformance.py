"""Run PEFT's own tests twice, plainly and with lorafast's class in place of PEFT's lora.Linear.

    python tools/conformance.py

Downloads the source distribution of the installed PEFT, the only one that contains its tests;
nothing of it is kept in this repository. Fails if a test fails with lorafast's class and passes
without, or if too few calls ran on lorafast's ops for the comparison to mean anything.
"""

import collections
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "conformance"
FILES = (
    "test_custom_models.py",
    "test_mixed.py",
    "test_lora_variants.py",
    "test_initialization.py",
)
SELECTION = "lora or dora"
MIN_OP_CALLS = 300
# The test expects a message that contains the name of PEFT's own class.
ALLOWED_FAILURES = {
    "test_initialization.TestLoraInitialization.test_modules_to_save_targets_lora_layer_raises"
}
# The key of calls on lorafast's ops among the plugin's counts; all others are reasons.
OP_CALLS = "op"

# "passed", "failed" or "skipped" by the name of a test.
Outcomes = dict[str, str]


def main() -> int:
    """Run both, print the table, and return the exit status."""
    folder = _download_tests()
    plain, _ = _run(folder, "plain")
    lorafast, counts = _run(folder, "lorafast", "-p", "conformance_plugin")
    new_failures = sorted(
        name
        for name, outcome in lorafast.items()
        if outcome == "failed" and plain.get(name) != "failed"
    )
    not_run = sorted(plain.keys() - lorafast.keys())
    _print_table(plain, lorafast, counts)
    for name in new_failures:
        print(f"{'allowed to differ' if name in ALLOWED_FAILURES else 'NEW FAILURE'}: {name}")
    for name in not_run:
        print(f"NOT RUN: {name}")
    too_few = counts[OP_CALLS] < MIN_OP_CALLS
    if too_few:
        print(
            f"TOO FEW: {counts[OP_CALLS]} calls ran on lorafast's ops, at least {MIN_OP_CALLS} must"
        )
    unexpected = set(new_failures) - ALLOWED_FAILURES
    return 1 if unexpected or not_run or too_few else 0


def _download_tests() -> Path:
    """Return the folder to run PEFT's tests in, downloaded if it is not there yet."""
    version = importlib.metadata.version("peft")
    folder = WORK / f"peft-{version}"
    if not folder.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        source_only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        requirement = ["--dest", str(WORK), f"peft=={version}"]
        subprocess.run([*pip, *source_only, *requirement], check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    # The distribution lacks this file, and the tests import each other as a package.
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def _run(folder: Path, name: str, *options: str) -> tuple[Outcomes, collections.Counter]:
    """Run PEFT's tests, and return their outcomes and what the plugin counted."""
    report, counts_folder, log = WORK / f"{name}.xml", WORK / "counts", WORK / f"{name}.log"
    for file in [report, *counts_folder.glob("*.json")]:
        file.unlink(missing_ok=True)
    counts_folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "tools"),
        "CONFORMANCE_COUNTS": str(counts_folder),
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider"]
    files = [f"tests/{file}" for file in FILES]
    print(f"{name}: {len(FILES)} files of PEFT's tests", flush=True)
    with open(log, "w") as output:
        subprocess.run(
            [*pytest, "--tb=short", "-k", SELECTION, f"--junitxml={report}", *options, *files],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    if not report.exists():
        sys.exit(f"{name}: PEFT's tests did not run; see {log.relative_to(ROOT)}")
    counts = collections.Counter()
    for file in counts_folder.glob("*.json"):
        counts.update(json.loads(file.read_text()))
    return _read_outcomes(report), counts


def _read_outcomes(report: Path) -> Outcomes:
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').removeprefix('tests.')}.{case.get('name')}"
        tags = {child.tag for child in case}
        if tags & {"failure", "error"}:
            outcomes[name] = "failed"
        else:
            outcomes[name] = "skipped" if "skipped" in tags else "passed"
    return outcomes


def _print_table(plain: Outcomes, lorafast: Outcomes, counts: collections.Counter) -> None:
    print(f"{'':28}{'plain':>24}{'lorafast':>24}   (passed, skipped, failed)")
    for file in FILES:
        cells = []
        for outcomes in (plain, lorafast):
            prefix = file.removesuffix("py")
            totals = collections.Counter(
                outcome for name, outcome in outcomes.items() if name.startswith(prefix)
            )
            cells.append(", ".join(str(totals[kind]) for kind in ("passed", "skipped", "failed")))
        print(f"{file:28}{cells[0]:>24}{cells[1]:>24}")
    print(f"calls on lorafast's ops: {counts[OP_CALLS]}; on PEFT's own forward:")
    for reason, count in counts.most_common():
        if reason != OP_CALLS:
            print(f"{count:8}  {reason}")


if __name__ == "__main__":
    sys.exit(main())

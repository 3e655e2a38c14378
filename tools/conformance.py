"""PEFT's own tests, plainly and with lorafast's class in place of PEFT's lora.Linear: `python tools/conformance.py`.

Downloads the source distribution of the PEFT that is installed, for its tests are in it and nowhere else; nothing of it is kept in
this repository. Fails where a test fails with our class and passes without, or where too few calls ran on our ops to say anything.
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
FILES = ("test_custom_models.py", "test_mixed.py", "test_lora_variants.py", "test_initialization.py")
SELECTED = "lora or dora"
LEAST_FAST_CALLS = 300
# Expects a message with the name of PEFT's own class in it.
ALLOWED = {"test_initialization.TestLoraInitialization.test_modules_to_save_targets_lora_layer_raises"}

Outcomes = dict[str, str]


def main() -> int:
    """Both runs, the table, and the exit status."""
    tests = _tests()
    plain, _ = _run(tests, "plain")
    ours, counts = _run(tests, "lorafast", "-p", "conformance_plugin")
    new = sorted(name for name, outcome in ours.items() if outcome == "failed" and plain.get(name) != "failed")
    lost = sorted(plain.keys() - ours.keys())
    _print(plain, ours, counts)
    unexpected = [name for name in new if name not in ALLOWED]
    for name in new:
        print(f"{'allowed to differ' if name in ALLOWED else 'NEW FAILURE'}: {name}")
    for name in lost:
        print(f"NOT RUN: {name}")
    fast = counts["fast"]
    if fast < LEAST_FAST_CALLS:
        print(f"TOO FEW: {fast} calls ran on lorafast's ops, at least {LEAST_FAST_CALLS} must")
    return 1 if unexpected or lost or fast < LEAST_FAST_CALLS else 0


def _tests() -> Path:
    """The folder that PEFT's tests are run from, downloaded if it is not there yet."""
    version = importlib.metadata.version("peft")
    folder = WORK / f"peft-{version}"
    if not folder.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", "--dest", str(WORK), f"peft=={version}"], check=True)
        with tarfile.open(WORK / f"peft-{version}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    # What the distribution leaves out: the tests import each other as a package.
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def _run(folder: Path, name: str, *options: str) -> tuple[Outcomes, collections.Counter]:
    """Every test's outcome, and what the plugin counted."""
    told, counted = WORK / f"{name}.xml", WORK / "counts"
    for file in [told, *counted.glob("*.json")]:
        file.unlink(missing_ok=True)
    counted.mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tools"), "CONFORMANCE_COUNTS": str(counted)}
    files = [f"tests/{file}" for file in FILES]
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--tb=short", "-k", SELECTED]
    print(f"{name}: {len(FILES)} files of PEFT's tests", flush=True)
    with open(WORK / f"{name}.log", "w") as log:
        subprocess.run([*pytest, f"--junitxml={told}", *options, *files], cwd=folder, env=environment, stdout=log, stderr=log)
    if not told.exists():
        sys.exit(f"{name}: PEFT's tests did not run; see {(WORK / f'{name}.log').relative_to(ROOT)}")
    counts = collections.Counter()
    for file in counted.glob("*.json"):
        counts.update(json.loads(file.read_text()))
    return _outcomes(told), counts


def _outcomes(file: Path) -> Outcomes:
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname').removeprefix('tests.')}.{case.get('name')}"
        kinds = {child.tag for child in case}
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


def _print(plain: Outcomes, ours: Outcomes, counts: collections.Counter) -> None:
    print(f"{'':28}{'plain':>24}{'lorafast':>24}   (passed, skipped, failed)")
    for file in FILES:
        cells = []
        for outcomes in (plain, ours):
            found = collections.Counter(outcome for name, outcome in outcomes.items() if name.startswith(file.removesuffix("py")))
            cells.append(", ".join(str(found[kind]) for kind in ("passed", "skipped", "failed")))
        print(f"{file:28}{cells[0]:>24}{cells[1]:>24}")
    print(f"calls on lorafast's ops: {counts['fast']}; on PEFT's own forward:")
    for reason, count in counts.most_common():
        if reason != "fast":
            print(f"{count:8}  {reason}")


if __name__ == "__main__":
    sys.exit(main())

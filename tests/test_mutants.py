"""The lists of mutants fit the code as it stands, and the tool tells survivors from the others."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorafast

ROOT = Path(lorafast.__file__).resolve().parent.parent
# What the lists must cover.
FOLDERS = (
    "lorafast/engine/",
    "lorafast/integrations/",
    "lorafast/nn/",
    "lorafast/quantised/",
    "lorafast/functional.py",
    "kernels/",
    "csrc/cpu/",
    "csrc/cuda/",
    "csrc/host/",
    "csrc/launch/",
)


def _tool():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = _tool()
MUTANTS = mutants.read()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.group}: {mutant.name}")
def test_every_text_occurs_once_and_every_test_exists(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test


def test_there_are_enough_everywhere():
    assert len(MUTANTS) >= 30
    assert len({(mutant.group, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
    for folder in FOLDERS:
        assert any(mutant.file.startswith(folder) for mutant in MUTANTS), folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout of one module and one test."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "module.py").write_text("def double(x):\n    return 2 * x\n")
    (root / "tests" / "test_module.py").write_text(
        "import module\n\ndef test_double():\n    assert module.double(3) == 6\n"
    )
    return root


def _mutant(name, new, old="2 * x"):
    return mutants.Mutant("list", name, "module.py", old, new, ("tests/test_module.py",))


def test_a_survivor_is_told_from_what_is_noticed_or_broken(checkout, capsys):
    some = [_mutant("found", "3 * x"), _mutant("same", "x + x"), _mutant("broken", "2 *")]
    verdicts = mutants.judge_all(some, checkout)
    assert {mutant.name: verdict.outcome for mutant, verdict in verdicts.items()} == {
        "found": "killed",
        "same": "survived",
        "broken": "broken",
    }
    assert "test_double" in verdicts[some[0]].detail
    assert (checkout / "module.py").read_text().count("2 * x") == 1
    assert "survived" in capsys.readouterr().out


def test_what_does_not_fit_or_fails_anyway_is_no_verdict(checkout):
    with pytest.raises(SystemExit, match=r"list: gone: the text occurs 0 times in module\.py"):
        mutants.judge_all([_mutant("gone", "3 * x", old="4 * x")], checkout)
    (checkout / "module.py").write_text("def double(x):\n    return 2 * x + 1\n")
    with pytest.raises(SystemExit, match=r"without a mutant: .*test_double"):
        mutants.judge_all([_mutant("found", "3 * x")], checkout)


def test_the_list_is_printed_and_chosen_from():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "mutants.py", "--list"], capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == len(MUTANTS)
    assert mutants.chosen(MUTANTS, "2,1") == [MUTANTS[1], MUTANTS[0]]
    assert {mutant.group for mutant in mutants.chosen(MUTANTS, "csrc")} == {"csrc"}
    with pytest.raises(SystemExit, match="no such mutant"):
        mutants.chosen(MUTANTS, "nowhere")

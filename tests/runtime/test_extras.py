"""Hints to install name what pip finds: an extra of a checkout, or a package of an index."""

import importlib
import re
import sys
import tomllib

import pytest
from helpers.packages import ROOT, run

from lorafast.runtime import extras

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# lorafast by its name, with an extra or without: pip would look for it on an index.
BY_NAME = re.compile(r"\blorafast\[|pip install (-\S+ )*['\"]?lorafast\b")


def texts(*patterns):
    """{name: text} of the files that git does not ignore, tests left out."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", *patterns, cwd=ROOT).stdout
    paths = [ROOT / name for name in listed.splitlines() if not name.startswith("tests/")]
    return {
        str(path.relative_to(ROOT)): path.read_text(errors="replace")
        for path in paths
        if path.is_file()
    }


def test_no_hint_names_a_package_that_is_on_no_index():
    found = texts()
    assert {"README.md", "docs/quickstart.md", "bench/cli.py", "Makefile"} <= {*found}
    assert not [name for name, text in found.items() if BY_NAME.search(text)]


def test_one_place_says_how_to_install_an_extra():
    hints = {name for name, text in texts("*.py").items() if re.search(r"pip install '?\.\[", text)}
    assert hints == {"lorafast/runtime/extras.py"}


def test_the_extras_are_those_of_the_project():
    declared = PROJECT["optional-dependencies"]
    assert {*extras.EXTRAS} == {*declared} - {"dev", "docs"}
    # Under their names on an index; peft itself brings two that lorafast imports.
    projects = {"pynvml": "nvidia-ml-py"}
    for extra, packages in extras.EXTRAS.items():
        listed = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared[extra]}
        named = {projects.get(package, package).replace("_", "-") for package in packages}
        assert named - {"transformers", "accelerate"} <= listed | {"huggingface-hub"}


def test_an_unknown_extra_is_refused():
    with pytest.raises(ValueError, match="extra='pef' is not one of peft, hub, quant, triton"):
        extras.how_to_install("pef")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with (
        pytest.raises(
            ModuleNotFoundError, match=r"huggingface_hub: pip install '\.\[hub\]'"
        ) as told,
        extras.required("hub"),
    ):
        import huggingface_hub  # noqa: F401
    assert told.value.name == "huggingface_hub"
    assert isinstance(told.value.__cause__, ModuleNotFoundError)


NEED_PEFT = (
    "peft_calls", "peft_cost", "peft_lamda", "peft_lamda_variant", "peft_linear", "peft_support",
    "trainer",
)  # fmt: skip


@pytest.mark.parametrize("module", NEED_PEFT)
def test_what_needs_peft_says_so(module, monkeypatch):
    for name in NEED_PEFT:
        monkeypatch.delitem(sys.modules, f"lorafast.integrations.{name}", raising=False)
    # A submodule that other tests have imported would be found without its package.
    for name in [n for n in sys.modules if n.partition(".")[0] in extras.EXTRAS["peft"]]:
        monkeypatch.delitem(sys.modules, name)
    for package in extras.EXTRAS["peft"]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^this needs [\w.]+: pip install '\.\[peft\]' in a"
    ):
        importlib.import_module(f"lorafast.integrations.{module}")

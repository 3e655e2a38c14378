"""The package as users get it: wheel, sdist, editable, symlinks, and the environment tool."""

import importlib.util
import os
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.packages import ROOT, build_wheel, copy_checkout, run, wheel_of

import lorafast
from lorafast.runtime import symlinks

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Whatever csrc holds today, the next file of its kind travels with the package.
SOURCES = (
    "csrc/cpu/one_more.cpp",
    "csrc/cpu/one_more.h",
    "csrc/cuda/one_more.cu",
    "csrc/cuda/one_more.cuh",
)


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout, links as links."""
    copy = copy_checkout(tmp_path / "tree")
    for name in SOURCES:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
    return copy


def test_the_wheel_holds_real_files_and_runs(tree, tmp_path):
    wheel = wheel_of(tree, tmp_path / "out")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "lorafast/engine/kernels/philox.py",
        "lorafast/engine/kernels/cost.py",
        "lorafast/engine/csrc/README.md",
        "lorafast/bench/README.md",
        *(f"lorafast/engine/{name}" for name in SOURCES),
    } <= names
    assert not any(name.startswith("kernels/") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    probe = (
        "import lorafast, lorafast.engine.kernels.cost, torch\n"
        "print(lorafast.Linear(4, 3)(torch.ones(2, 4)).shape, lorafast.__file__)"
    )
    # On eager: what the wheel's own C++ compiles to is the same as the checkout's.
    environment = {"PYTHONPATH": tmp_path / "site", "LORAFAST_BACKEND": "eager"}
    said = run(sys.executable, "-c", probe, cwd=tmp_path, **environment).stdout
    assert "torch.Size([2, 3])" in said
    assert str(tmp_path / "site") in said


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(tree, tmp_path):
    out = tmp_path / "sdist"
    run(
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        out,
        tree,
        cwd=tmp_path,
    )
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() for member in archive.getmembers())
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    from_sdist = wheel_of(unpacked, tmp_path / "a")
    from_tree = wheel_of(tree, tmp_path / "b")
    names = [
        sorted(n for n in zipfile.ZipFile(w).namelist() if n.startswith("lorafast/"))
        for w in (from_sdist, from_tree)
    ]
    assert names[0] == names[1]


@pytest.mark.slow
def test_an_editable_install_runs_from_anywhere(tree, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).stdout.strip()
    # torch, setuptools and pip come from here; what is under test is how lorafast itself is found.
    borrowed = [p for p in sys.path if "site-packages" in p] or [sysconfig.get_path("purelib")]
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
        "-e",
        tree,
        cwd=tmp_path,
    )
    probe = (
        "import lorafast, lorafast.engine.kernels.cost as c, lorafast.engine.kernels.philox\n"
        "print(lorafast.__file__, c.__file__)"
    )
    said = run(python, "-c", probe, cwd=tmp_path).stdout.split()
    assert all(path.startswith(str(tree)) for path in said)


@pytest.mark.slow
def test_hugging_faces_kernels_wins_from_the_root(tree, tmp_path):
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHOSE = 'theirs'\n")
    probe = "import lorafast.engine.kernels.cost, kernels; assert kernels.WHOSE == 'theirs'"
    (tree / "tests" / "test_whose.py").write_text(f"def test_whose():\n    {probe}\n")
    for how in (
        ("-c", probe),
        ("-P", "-c", probe),
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_whose.py"),
    ):
        run(sys.executable, *how, cwd=tree, PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{tree}")


@pytest.fixture
def without_links(tree):
    """The checkout git makes where symlinks are off: small text files."""
    for path in symlinks.LINKS.values():
        link = tree / "lorafast" / path
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    return tree


def test_a_checkout_without_symlinks_runs_and_says_how_to_mend_it(without_links):
    probe = (
        "import lorafast, torch\n"
        "layer = lorafast.Linear(4, 3)\n"
        "layer(torch.ones(2, 4)).sum().backward()\n"
        "print(lorafast.explain(layer))"
    )
    said = run(sys.executable, "-c", probe, cwd=without_links).stdout
    assert "lorafast/engine/kernels is a text file" in said
    assert "git config core.symlinks true && git checkout -- lorafast/engine/kernels" in said


def test_a_wheel_without_kernels_is_not_built(without_links, tmp_path):
    done = build_wheel(without_links, tmp_path / "out", check=False)
    assert done.returncode != 0
    assert "lorafast/" in done.stdout + done.stderr
    assert not list(tmp_path.glob("out/*.whl"))


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "lorafast").rglob("*.py")}
    for folder, link in symlinks.LINKS.items():
        below = {path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        folders |= {ROOT / "lorafast" / link / path for path in {Path(), *below}}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_build_needs_setuptools_alone():
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lorafast.__version__"}
    assert lorafast.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def environment():
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_gets_one_clear_line(tree, tmp_path):
    old = tmp_path / "python2.7"
    pretend = (
        "import sys; sys.version_info = (2, 7, 18); sys.version = '2.7.18 (x)'; exec(sys.argv[2])"
    )
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$@"\n')
    old.chmod(0o755)
    done = run("make", "env", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", cwd=tree, check=False)
    assert done.returncode != 0
    first, make = done.stderr.strip().splitlines()
    assert first == (
        "lorafast needs Python 3.11 or newer; this is 2.7.18. "
        "Choose one: make PYTHON=python3.11 ..."
    )
    assert make.startswith("make: ***")
    assert not (tmp_path / "venv").exists()


def test_an_environment_of_another_python_is_left_alone(environment, tmp_path, monkeypatch):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho '[[3, 9], \"/site\"]'\n")
    python.chmod(0o755)
    monkeypatch.setattr(environment, "_site_with_torch", lambda python: None)
    with pytest.raises(SystemExit, match=r"is Python 3\.9, this is .*make clean"):
        environment.main(tmp_path / "venv")


def test_an_environment_needs_the_links(without_links, tmp_path):
    done = run(
        sys.executable,
        without_links / "tools" / "environment.py",
        tmp_path / "venv",
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr.strip().splitlines() == [
        symlinks.why_missing("kernels", without_links / "lorafast")
    ]


def test_a_python_without_ensurepip_gets_one_clear_line(environment, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"no ensurepip.*make PYTHON="):
        environment._check()


@pytest.mark.parametrize(
    ("version", "reused"),
    [
        ("2.13.0+cpu", True),
        ("2.11.0+cu130", True),
        ("2.12.0a0+abc", True),
        ("2.11.0a0+abc", False),
        ("2.10.1", False),
    ],
)
def test_an_importable_torch_is_reused_if_new_enough(environment, tmp_path, version, reused):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh\necho '["{version}", "/p/torch/__init__.py"]'\n""")
    python.chmod(0o755)
    assert environment._site_with_torch(str(python)) == ("/p" if reused else None)


def test_no_torch_is_none(environment, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert environment._site_with_torch(str(python)) is None

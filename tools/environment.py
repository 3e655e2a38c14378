"""Make a virtual environment with lorafast in it, editable: `python tools/environment.py VENV`.

It needs nothing installed. An importable torch of at least 2.11 is reused, whatever build it is;
otherwise constraints.txt says which one is installed.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

OLDEST_TORCH = (2, 11)
ROOT = Path(__file__).resolve().parent.parent

_PROBE = "import json, torch; print(json.dumps([torch.__version__, torch.__file__]))"
_FACTS = (
    "import json, sys, sysconfig; "
    "print(json.dumps([list(sys.version_info[:2]), sysconfig.get_path('purelib')]))"
)


def main(venv: Path) -> None:
    """Create VENV, or bring it up to date."""
    _check()
    python = venv.resolve() / "bin" / "python"
    shared = _site_with_torch(sys.executable)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    version, packages = json.loads(
        subprocess.run([python, "-c", _FACTS], check=True, capture_output=True, text=True).stdout
    )
    if tuple(version) != sys.version_info[:2]:
        sys.exit(
            f"{venv} is Python {version[0]}.{version[1]}, this is {sys.version.split()[0]}: "
            "make clean, or choose VENV="
        )
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if shared:
        # A path file rather than --system-site-packages, which an interpreter that is itself in a
        # virtual environment ignores.
        (Path(packages) / "torch_of_the_base.pth").write_text(f"{shared}\n")
        chosen = []
    else:
        chosen = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *chosen, "torch"], check=True)
    # Not isolated: the build needs setuptools alone, and must never bring a torch of its own.
    subprocess.run([*pip, "setuptools>=77", "wheel"], check=True)
    package = f"{ROOT}[bench,dev,docs,gguf,quant,triton]"
    subprocess.run(
        [*pip, *chosen, "--no-build-isolation", "--editable", package],
        check=True,
    )


def _site_with_torch(python: str) -> str | None:
    """The folder that holds a new enough torch, if this interpreter imports one."""
    found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, cwd="/")
    if found.returncode:
        return None
    version, file = json.loads(found.stdout)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    # pip puts 2.11.0a0 before 2.11, and would install another torch over it.
    too_old = numbers < OLDEST_TORCH or (
        numbers == OLDEST_TORCH and re.search(r"\d(a|b|rc|\.dev)\d", version.split("+")[0])
    )
    return None if too_old else str(Path(file).parent.parent)


def _check() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            "this Python has no ensurepip, so it makes no environment; "
            "install python3-venv or make PYTHON=..."
        )
    spec = importlib.util.spec_from_file_location(
        "symlinks", ROOT / "lorafast" / "runtime" / "symlinks.py"
    )
    symlinks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(symlinks)
    for folder in symlinks.LINKS:
        if lost := symlinks.why_missing(folder):
            sys.exit(lost)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/environment.py VENV")
    main(Path(sys.argv[1]))

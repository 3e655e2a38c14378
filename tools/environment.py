"""Make a virtual environment with lorafast in it, editable: `python tools/environment.py VENV`. Needs nothing installed.

An importable torch of at least 2.11 is reused, whatever build it is; otherwise constraints.txt says which one is installed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
ROOT = Path(__file__).resolve().parent.parent

_PROBE = "import json, torch; print(json.dumps([torch.__version__, torch.__file__]))"


def main(venv: Path) -> None:
    """Create VENV, or bring it up to date."""
    python = venv.resolve() / "bin" / "python"
    shared = _site_with_torch(sys.executable)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if shared:
        # A path file rather than --system-site-packages, which an interpreter that is itself a virtual environment ignores.
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True, text=True
        )
        (Path(packages.stdout.strip()) / "torch_of_the_base.pth").write_text(f"{shared}\n")
        chosen = []
    else:
        chosen = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *chosen, "torch"], check=True)
    # Not isolated: the build needs setuptools alone, and must never bring a torch of its own.
    subprocess.run([*pip, "setuptools>=77", "wheel"], check=True)
    subprocess.run([*pip, *chosen, "--no-build-isolation", "--editable", f"{ROOT}[dev,triton]"], check=True)


def _site_with_torch(python: str) -> "str | None":  # quoted: an old Python must get as far as the check below
    """The folder that holds a new enough torch, if this interpreter imports one."""
    found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, cwd="/")
    if found.returncode:
        return None
    version, file = json.loads(found.stdout)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return str(Path(file).parent.parent) if numbers >= OLDEST_TORCH else None


def _check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"lorafast needs Python 3.11 or newer; this is {sys.version.split()[0]}. Choose one: make PYTHON=python3.11 ...")
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            "this Python has no ensurepip, so it makes no environment; install python3-venv or choose another: make PYTHON=..."
        )


if __name__ == "__main__":
    _check_python()
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/environment.py VENV")
    main(Path(sys.argv[1]))

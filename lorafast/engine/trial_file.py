"""The file of a GPU's verdict: an entry of JSON for the forms that are tried together."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from lorafast.engine.trial_forms import ENTRIES, Verdict
from lorafast.runtime import build_cache, env, whole_file


class Damaged(Exception):
    """A file that is there and holds no verdict."""


def path(folder: Path, sha16: str) -> Path:
    """Return the file of the GPU whose facts have a hash."""
    return folder / f"gpu-{sha16}.json"


def writable_folder() -> tuple[Path | None, str]:
    """Return the folder for the file, or a temporary one and why; None if there is neither."""
    cache = Path(env.cache())
    try:
        if str(cache).startswith("~"):
            raise FileNotFoundError(2, "there is no home folder")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache, ""
    except OSError as error:
        why = f"{env.CACHE.name}: {cache} cannot be used ({error.strerror or error})"
    try:
        return build_cache.temporary_folder(), f"{why}, and no verdict is in a temporary folder"
    except OSError as error:
        return None, f"{why}, and neither can a temporary folder: {error.strerror or error}"


def read(file: Path, entry: str) -> Verdict | None:
    """Return an entry; None if there is none. Damaged if the file holds something else."""
    try:
        content = json.loads(file.read_text())["entries"]
        if entry not in content:
            return None
        found = Verdict(**content[entry])
        complete = {str(form) for form in ENTRIES[entry]} <= found.forms.keys()
        if not complete or not all(isinstance(rate, float) for rate in found.rates.values()):
            raise ValueError(entry)
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{file} is damaged") from error


def write(file: Path, facts: dict[str, str], found: dict[str, Verdict]) -> None:
    """Add entries to the file, which readers see whole or not at all."""
    content: dict[str, Any] = {"gpu": facts, "entries": {}}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content["entries"] = dict(json.loads(file.read_text())["entries"])
    for entry, verdict in found.items():
        content["entries"][entry] = {
            "forms": verdict.forms,
            "rates": verdict.rates,
            "seconds": verdict.seconds,
            "when": verdict.when,
            "free": verdict.free,
        }
    whole_file.write(file, json.dumps(content, indent=1) + "\n")

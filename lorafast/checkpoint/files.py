"""An adapter's folder: adapter_model.safetensors and adapter_config.json, written whole or not at all, and read as if forged.

The tensors' file carries a copy of the config, so that it alone is a whole adapter: a save that is killed leaves the old adapter or
the new one. Where a config is replaced by another, the old one steps aside until the tensors are in place. Saves into one folder
take turns, and a reader that met one begins again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's configs name every layer at worst; this is a hundred thousand names.
_LARGEST_CONFIG = 1 << 24
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    # Buffers of modules to save.
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    },
}
_OLD = f".{CONFIG}.*.old"
_TRIES = 20  # to read a folder that somebody is saving into
_STALE = 3600  # seconds after which the temporary file of a killed save may go
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Entry(NamedTuple):
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class AdapterFile(NamedTuple):
    """A folder's adapter. extras: what lorafast wrote beside PEFT's config. file: the open tensors' file, which no save changes."""

    config: dict[str, Any]
    extras: dict[str, Any]
    entries: dict[str, Entry]
    file: Any

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, on the CPU."""
        with _sound():
            return {key: self.file.get_tensor(key) for key in self.entries}


def located(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a path, or of an id on the Hugging Face hub, which is downloaded: the two files and nothing else."""
    folder = Path(path)
    try:
        found = bool(os.fspath(path)) and folder.is_dir()
        other = not found and folder.exists()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"path {os.fspath(path)[:200]!r} is no folder: {error}") from error
    if found:
        return folder
    if isinstance(path, os.PathLike) or other or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"path {os.fspath(path)[:200]!r} is no folder, and no id on the hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        message = f"path {path!r} is no folder; to read it as an id on the hub: pip install 'lorafast[hub]'"
        raise FileNotFoundError(message) from None
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # whatever the network and the hub's client raise
        raise FileNotFoundError(
            f"path {path!r} is no folder, and the hub gave no adapter of that id: {error}"
        ) from error


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[AdapterFile]:
    """Config and header of a folder, checked. ValueError or FileNotFoundError naming the file and what is wrong with it."""
    weights = folder / WEIGHTS
    if not weights.exists() and (pickled := sorted(folder.glob("adapter_model*.bin"))):
        raise ValueError(
            f"{pickled[0].name} is a pickle, which lorafast does not open: convert it to {WEIGHTS} where it came from"
        )
    for _ in range(_TRIES):
        before = _states(folder)
        _refuse_irregular(weights)
        with _sound():
            file = safetensors.safe_open(weights, framework="pt", device="cpu")
        with file:
            with _sound():
                metadata = file.metadata() or {}
                parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no dict)
            extras = (
                _parsed(metadata["lorafast"], f"{WEIGHTS} metadata")
                if "lorafast" in metadata
                else {}
            )
            try:
                config = _config(folder, extras)
            except FileNotFoundError:
                if before == _states(folder):
                    raise
                continue
            if before != _states(folder):
                continue
            yield AdapterFile(
                config, extras, {key: _entry(key, part) for key, part in parts.items()}, file
            )
            return
    raise ValueError(
        f"{WEIGHTS} and {CONFIG} change all the time: somebody is saving into the folder"
    )


def _states(folder: Path) -> tuple:
    """What changes with every save."""
    found = []
    for path in (folder / WEIGHTS, folder / CONFIG):
        try:
            state = path.stat()
            found.append((state.st_ino, state.st_mtime_ns, state.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


def _config(folder: Path, extras: dict[str, Any]) -> dict[str, Any]:
    """The folder's config; after a save that was killed, the one its tensors came with."""
    config = folder / CONFIG
    if not config.exists():
        if isinstance(copied := extras.get("adapter_config"), dict):
            return copied
        config = next(iter(folder.glob(_OLD)), config)
    _refuse_irregular(config)
    return _parsed(_bytes(config), CONFIG)


def write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], extras: dict[str, Any]
) -> None:
    """Put an adapter into a folder, which is made if need be. Whatever stops it, no file is left half-written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path {os.fspath(folder)!r} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _write(folder, tensors, config, extras)


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], extras: dict[str, Any]
) -> None:
    _sweep(folder)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    metadata = {
        "format": "pt",
        "lorafast": json.dumps(extras | {"adapter_config": config}, sort_keys=True),
    }
    weights, said = _temporary(folder, WEIGHTS), _temporary(folder, CONFIG)
    try:
        save_file(_savable(tensors), weights, metadata=metadata)
        said.write_bytes(text)
        # safetensors lets nobody else read what it writes.
        shutil.copymode(said, weights)
        for path in (weights, said):
            _flush(path)
        with _aside(folder, text):
            os.replace(weights, folder / WEIGHTS)
        os.replace(said, folder / CONFIG)
        for path in folder.glob(_OLD):
            path.unlink(missing_ok=True)
        _flush(folder)
    finally:
        for path in (weights, said):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One save at a time into a folder, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have none
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _aside(folder: Path, text: bytes) -> Iterator[None]:
    """While the tensors change, a config that will change too is out of the way; it comes back if they do not."""
    config = folder / CONFIG
    if not config.is_file() or (config.stat().st_size == len(text) and config.read_bytes() == text):
        yield
        return
    for older in folder.glob(_OLD):  # a config in its place is newer
        older.unlink(missing_ok=True)
    old = folder / _OLD.replace("*", secrets.token_hex(8))
    os.replace(config, old)
    try:
        yield
    except BaseException:
        os.replace(old, config)
        raise


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.{secrets.token_hex(8)}.tmp"


def _sweep(folder: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        for path in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()


def _savable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dense copies on the CPU where a tensor is elsewhere, strided or shares its storage: safetensors writes nothing else."""
    seen, dense = set(), {}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{key} {tuple(tensor.shape)} is on the meta device, and has no values to save"
            )
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        dense[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return dense


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_irregular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileNotFoundError(f"{path.name} is not in the folder: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path.name} is no regular file")


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{WEIGHTS} is no sound safetensors file: {error}") from error


def _entry(key: str, part: Any) -> Entry:
    if part.get_dtype() not in _DTYPES:
        raise ValueError(
            f"{WEIGHTS}: {key} {tuple(part.get_shape())} is {part.get_dtype()}, not one of {', '.join(_DTYPES)}"
        )
    return Entry(_DTYPES[part.get_dtype()], tuple(part.get_shape()))


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than any config has")
    return path.read_bytes()


def _parsed(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no sound JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object but a {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")

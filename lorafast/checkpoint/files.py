"""An adapter's folder: adapter_model.safetensors and adapter_config.json.

A save is atomic: a process that is killed leaves the old adapter or the new one. For this the
tensors' file carries a copy of the config in its metadata, so that it is a complete adapter by
itself; where the config changes too, the old config is renamed until the new tensors are in place.
Saves into one folder run one after the other, and a reader that overlaps with one starts again.

Nothing that is read is trusted: no pickles, and every size and type is checked.
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

from lorafast.runtime import extras

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The files of a whole model, as transformers names them.
_MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin")
# In bytes. A PEFT config may name every layer; this is enough for a hundred thousand names.
_MAX_CONFIG_SIZE = 1 << 24
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    # Buffers of modules to save.
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Name of a config that a save has renamed; * is random.
_OLD_CONFIG = f".{CONFIG}.*.old"
# Attempts to read a folder while another process saves into it.
_MAX_READS = 20
# Seconds after which the temporary file of a killed save is removed.
_STALE_AGE = 3600
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Entry(NamedTuple):
    """The dtype and shape of one tensor, from the file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class AdapterFile(NamedTuple):
    """The adapter in a folder.

    config: PEFT's config. extras: what lorafast wrote beside it. entries: the header, by key. file:
    the open tensors' file, which keeps its content even if a save replaces it.
    """

    config: dict[str, Any]
    extras: dict[str, Any]
    entries: dict[str, Entry]
    file: Any

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor, on the CPU, by key."""
        with _safetensors_errors():
            return {key: self.file.get_tensor(key) for key in self.entries}


def locate(path: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the folder of a path, or of an id on the Hugging Face hub after downloading it.

    Only the two files of the adapter are downloaded. FileNotFoundError if there is no such folder.
    """
    folder = Path(path)
    try:
        is_folder = bool(os.fspath(path)) and folder.is_dir()
        is_file = not is_folder and folder.exists()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"path {os.fspath(path)[:200]!r} is no folder: {error}") from error
    if is_folder:
        return folder
    if isinstance(path, os.PathLike) or is_file or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"path {os.fspath(path)[:200]!r} is no folder, and no id on the hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"path {path!r} is no folder; to read it as an id on the hub: "
            f"{extras.how_to_install('hub')}"
        ) from None
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # whatever the network and the hub's client raise
        raise FileNotFoundError(
            f"path {path!r} is no folder, and the hub gave no adapter of that id: {error}"
        ) from error


@contextlib.contextmanager
def open_adapter(folder: Path) -> Iterator[AdapterFile]:
    """Return a context with the folder's adapter, its config and header checked.

    Raises:
        ValueError, FileNotFoundError: a file is missing or malformed. Names the file.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        _refuse_other_kinds(folder)
    for _ in range(_MAX_READS):
        before = _file_states(folder)
        _refuse_irregular(weights)
        with _safetensors_errors():
            file = safetensors.safe_open(weights, framework="pt", device="cpu")
        with file:
            entries, extras = _read_header(file)
            try:
                config = _read_config(folder, extras)
            except FileNotFoundError:
                if before == _file_states(folder):
                    raise
                continue
            if before != _file_states(folder):
                continue
            yield AdapterFile(config, extras, entries, file)
            return
    raise ValueError(
        f"{WEIGHTS} and {CONFIG} change all the time: somebody is saving into the folder"
    )


def _refuse_other_kinds(folder: Path) -> None:
    """Raise an error that says what a folder without an adapter's file holds, if that is known."""
    if pickles := sorted(folder.glob("adapter_model*.bin")):
        raise ValueError(
            f"{pickles[0].name} is a pickle, which lorafast does not open: convert it to {WEIGHTS} "
            "where it came from"
        )
    models = [path for pattern in _MODEL_FILES for path in sorted(folder.glob(pattern))]
    if not models:
        return
    name, where = models[0].name, os.fspath(folder)
    if any(_has_adapter_keys(path) for path in models if path.suffix == ".safetensors"):
        raise FileNotFoundError(
            f"{where!r} holds no {WEIGHTS}: {name} is a whole model with keys of adapters beside "
            "base weights, which from_pretrained would drop (lorafast 0.1 saved so, and a model of "
            "which only a part was adapted does). Adapt the model as it was, load them by "
            "model.load_state_dict(safetensors.torch.load_file(file), strict=False), and save it "
            "again"
        )
    raise FileNotFoundError(
        f"{where!r} holds no {WEIGHTS}: {name} is a whole model without adapters, which "
        "transformers' from_pretrained loads"
    )


def _has_adapter_keys(path: Path) -> bool:
    """True if a model's safetensors file has tensors of lorafast's adapters."""
    with _safetensors_errors(path.name), safetensors.safe_open(path, framework="pt") as file:
        return any(key.rpartition(".")[2].startswith("lora_") for key in file.keys())  # noqa: SIM118  (no dict)


def _file_states(folder: Path) -> tuple:
    """Return what changes with every save: inode, time and size of both files."""
    states = []
    for path in (folder / WEIGHTS, folder / CONFIG):
        try:
            state = path.stat()
            states.append((state.st_ino, state.st_mtime_ns, state.st_size))
        except OSError:
            states.append(None)
    return tuple(states)


def _read_header(file: Any) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the entries by key, and lorafast's metadata."""
    with _safetensors_errors():
        metadata = file.metadata() or {}
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no dict)
    extras = {}
    if "lorafast" in metadata:
        extras = _parse_json(metadata["lorafast"], f"{WEIGHTS} metadata")
    return {key: _entry(key, part) for key, part in slices.items()}, extras


def _entry(key: str, part: Any) -> Entry:
    dtype, shape = part.get_dtype(), tuple(part.get_shape())
    if dtype not in _DTYPES:
        raise ValueError(f"{WEIGHTS}: {key} {shape} is {dtype}, not one of {', '.join(_DTYPES)}")
    return Entry(_DTYPES[dtype], shape)


def _read_config(folder: Path, extras: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's config; after a killed save, the copy that the tensors came with."""
    config = folder / CONFIG
    if not config.exists():
        if isinstance(copy := extras.get("adapter_config"), dict):
            return copy
        config = next(iter(folder.glob(_OLD_CONFIG)), config)
    _refuse_irregular(config)
    return _parse_json(_read_limited(config), CONFIG)


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], extras: dict[str, Any]
) -> None:
    """Write an adapter into a folder, which is created if need be.

    Args:
        folder: where to write.
        tensors: by key.
        config: content of adapter_config.json.
        extras: further metadata for load_adapter.

    Raises:
        NotADirectoryError: folder is a file.
        ValueError: a tensor is on the meta device.
        OSError: writing failed; the folder is unchanged.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path {os.fspath(folder)!r} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _folder_lock(folder):
        _write_locked(folder, tensors, config, extras)


def _write_locked(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], extras: dict[str, Any]
) -> None:
    _remove_stale(folder)
    config_text = json.dumps(config, indent=2, sort_keys=True).encode()
    metadata = {
        "format": "pt",
        "lorafast": json.dumps(extras | {"adapter_config": config}, sort_keys=True),
    }
    new_weights, new_config = _temporary_path(folder, WEIGHTS), _temporary_path(folder, CONFIG)
    try:
        save_file(_prepare_tensors(tensors), new_weights, metadata=metadata)
        new_config.write_bytes(config_text)
        # safetensors lets only the owner read what it writes.
        shutil.copymode(new_config, new_weights)
        for path in (new_weights, new_config):
            _sync(path)
        with _hidden_config(folder, config_text):
            os.replace(new_weights, folder / WEIGHTS)
        os.replace(new_config, folder / CONFIG)
        for path in folder.glob(_OLD_CONFIG):
            path.unlink(missing_ok=True)
        _sync(folder)
    finally:
        for path in (new_weights, new_config):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """A context that one process at a time enters, where the system has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _hidden_config(folder: Path, new_text: bytes) -> Iterator[None]:
    """A context in which a config that is about to change has another name.

    If the process is killed inside, the copy of the config in the tensors' file counts, which fits
    the tensors whether they have been replaced or not. After an error the config is restored.
    """
    config = folder / CONFIG
    if not config.is_file() or (
        config.stat().st_size == len(new_text) and config.read_bytes() == new_text
    ):
        yield
        return
    for older in folder.glob(_OLD_CONFIG):  # the config under its own name is newer
        older.unlink(missing_ok=True)
    old = folder / _OLD_CONFIG.replace("*", secrets.token_hex(8))
    os.replace(config, old)
    try:
        yield
    except BaseException:
        os.replace(old, config)
        raise


def _temporary_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.{secrets.token_hex(8)}.tmp"


def _remove_stale(folder: Path) -> None:
    """Remove temporary files that killed saves left long ago."""
    for name in (WEIGHTS, CONFIG):
        for path in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_AGE:
                    path.unlink()


def _prepare_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as safetensors can write them: dense, on the CPU, storages not shared."""
    storages, prepared = set(), {}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"{key} {tuple(tensor.shape)} is on the meta device, and has no values to save"
            )
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        prepared[key] = tensor.clone() if address in storages else tensor
        storages.add(address)
    return prepared


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
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
def _safetensors_errors(name: str = WEIGHTS) -> Iterator[None]:
    """A context that turns what safetensors raises into ValueError."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{name} is no sound safetensors file: {error}") from error


def _read_limited(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MAX_CONFIG_SIZE:
        raise ValueError(f"{path.name} has {size} bytes, more than any config has")
    return path.read_bytes()


def _parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """Return a JSON object. ValueError naming the source for anything else, NaN included."""
    try:
        value = json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no sound JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is no JSON object but a {type(value).__name__}")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")

"""The folder of built modules: whole files, locks, remembered failures, a temporary substitute."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "lorafast-kernels-"


def say(line: str) -> None:
    """Tell the user on stderr what is being built."""
    print(f"lorafast: {line}", file=sys.stderr, flush=True)


def seal(path: Path) -> None:
    """Append the file's hash, which the loader of shared objects ignores."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def is_complete(path: Path) -> bool:
    """True if the file exists and ends with its hash.

    A file that a full disk or a crash has cut short would kill the process that loads it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, and among threads too, since each opens the file itself."""
    # Not on every system, while lorafast is imported on all.
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a process forked meanwhile holds the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def remember_failure(record: Path, tools: str, reason: str) -> None:
    """Write down that a build by these tools fails, and why."""
    # A folder that became unwritable meanwhile costs another try, no more.
    with contextlib.suppress(OSError):
        record.write_text(f"{tools}\n{reason}\n")


def remembered_failure(record: Path, tools: str) -> str | None:
    """Return why a build by these very tools failed before; None if none did."""
    try:
        remembered, _, reason = record.read_text().partition("\n")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return reason.strip() if remembered == tools and reason.strip() else None


def temporary_folder() -> Path:
    """Return a temporary folder that only this user can write: an earlier process's, or a new one.

    A module is code, so one that another user could have written must never be loaded: a folder
    counts only if this user owns it and nobody else has access. OSError if there is none.
    """
    parent = Path(tempfile.gettempdir())
    found = parent.stat()
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    # Where others may rename what is not theirs, they could put a folder of their own in its place.
    if shared or found.st_uid not in (0, os.geteuid()):
        raise PermissionError(1, f"other users can rename what is in {parent}")
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        if _is_private(folder):
            return folder
    # One name for the processes that begin together: the first makes it, the others find it.
    folder = parent / f"{_PREFIX}{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if _is_private(folder):
        return folder
    # Another user has taken that name; the mode of this one is 0700 too.
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


def _is_private(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    # Without the setgid bit, which a folder may inherit and which gives nobody access.
    private = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o777 == 0o700
    return private and found.st_uid == os.geteuid()

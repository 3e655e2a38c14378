"""Cubins: forms of the CUDA kernels, each compiled when it is first needed, and kept in the cache.

A form is one compilation of one .cu with its own -D options. A file is named after a hash of the
sources, the options and the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
from pathlib import Path

from lorafast.runtime import build_cache, cuda_compiler, env
from lorafast.runtime.toolchain import Failure

_TRAILER = 32


def cubin(source: Path, architecture: str, options: tuple[str, ...]) -> bytes:
    """Return the cubin of a form, from the cache or compiled now.

    A Failure says why there is none. Where the cache cannot be written nothing is kept: a form
    takes a fraction of a second.
    """
    compiler = cuda_compiler.find()
    if isinstance(compiler, str):
        raise Failure(compiler)
    name = f"cuda_{source.stem}_{architecture}_{_digest(source, options, compiler.name)}.cubin"
    cache = env.cache()
    folder = None if cache.startswith("~") else Path(cache).absolute()
    with contextlib.suppress(OSError):
        if folder is not None and build_cache.is_complete(folder / name):
            return (folder / name).read_bytes()[:-_TRAILER]
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                # One compiles while the others wait: as many processes as GPUs begin together.
                held.enter_context(build_cache.locked(folder / "cuda.lock"))
                if build_cache.is_complete(folder / name):
                    return (folder / name).read_bytes()[:-_TRAILER]
        _say_once(compiler.name, architecture, folder)
        made = compiler.compile(source, architecture, options)
        with contextlib.suppress(OSError):
            if folder is not None:
                _keep(folder / name, made)
    return made


def _keep(path: Path, content: bytes) -> None:
    """Write a sealed file whole or not at all."""
    with tempfile.TemporaryDirectory(
        prefix=f"{path.stem}.build-", dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        made = Path(folder) / path.name
        made.write_bytes(content)
        build_cache.seal(made)
        made.replace(path)


def _digest(source: Path, options: tuple[str, ...], compiler: str) -> str:
    digest = hashlib.sha256(repr((options, compiler)).encode())
    try:
        for path in (source, *sorted(source.parent.glob("*.cuh"))):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise Failure(
            f"the CUDA sources cannot be read: {error}; install lorafast again"
        ) from error
    return digest.hexdigest()[:16]


@functools.cache
def _say_once(compiler: str, architecture: str, folder: Path | None) -> None:
    where = f"into {folder}" if folder else "for this process"
    build_cache.say(
        f"compiling its CUDA kernels for {architecture} by {compiler}, each when it is first "
        f"needed, once, {where}"
    )

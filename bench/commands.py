"""The commands of lorafast-bench. Results go to stdout and files, progress and errors to stderr."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from lorafast.bench import machine, options
from lorafast.bench.cases import implementations, linear, model
from lorafast.bench.cases.candidate import Problem
from lorafast.bench.errors import BenchError
from lorafast.bench.report import html_report, plots, tables
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record, Results
from lorafast.runtime import extras

# Exit status.
RIGHT, WRONG, FAILED, INTERRUPTED = 0, 1, 2, 130

# The width of tables in a pipe, which has no width of its own.
_PIPED_WIDTH = 170

# Implementations that run by default.
_LAYER_DEFAULTS = ("frozen", "full", "lorafast", "eager", "peft")
_MODEL_DEFAULTS = ("frozen", "lorafast", "peft")
_GPU_TOKENS, _CPU_TOKENS = (512, 2048, 8192), (64, 256, 1024)


def main(arguments: list[str]) -> int:
    """Run one command and return its exit status.

    0: no row is wrong. 1: a row is wrong. 2: the request cannot be served, or a file cannot be
    written. 130: interrupted; finished rows are kept.
    """
    asked = options.parser().parse_args(arguments)
    commands = {"linear": _linear, "model": _model, "tune": _tune, "report": _report, "env": _env}
    try:
        return commands[asked.command](asked, arguments)
    except BenchError as error:
        message = f"lorafast-bench {asked.command}: {error}"
        Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
        return FAILED


def _linear(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    tokens = asked.tokens or (_GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS)
    problems = tuple(
        Problem(shape.K, shape.N, R, M, p, dtype, device, asked.bias)
        for shape, R, p, M in itertools.product(asked.shape, asked.rank, asked.dropout, tokens)
    )
    plan = linear.Plan(
        problems=problems,
        impls=asked.impl or _default_impls(device, dtype),
        methods=asked.methods,
        dropout_on=asked.dropout_on,
        rounds=asked.rounds,
        seconds=asked.seconds or math.inf,
        warmup=asked.warmup,
        seed=asked.seed,
    )
    with Progress(linear.progress_total(plan)) as progress:
        return _collect(linear.run(plan, progress), asked, device, arguments, progress)


def _model(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    plan = model.Plan(
        model=asked.model,
        impls=asked.impl or tuple(map(implementations.parse, _MODEL_DEFAULTS)),
        methods=asked.methods,
        batch_sizes=asked.batch_sizes,
        seq=asked.seq,
        device=device,
        dtype=dtype,
        R=asked.rank,
        dropout=asked.dropout,
        dropout_on=asked.dropout_on,
        steps=asked.steps,
        train_batch=asked.train_batch,
        lr=asked.lr,
        rounds=asked.rounds,
        seconds=asked.seconds or math.inf,
        warmup=asked.warmup,
        seed=asked.seed,
    )
    with Progress(model.progress_total(plan)) as progress:
        return _collect(model.run(plan, progress), asked, device, arguments, progress)


def _tune(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    try:
        with extras.required("triton"):
            from lorafast.bench import tune
    except ImportError as error:
        raise BenchError(f"its kernels cannot be loaded: {error}") from error
    tune.check_device(device)
    problems = itertools.product(asked.shape, asked.rank, asked.dropout, asked.tokens)
    sizes = [tune.Sizes(M, shape.K, shape.N, R, p) for shape, R, p, M in problems]
    timings, chosen = [], {}
    with Progress(tune.progress_total(sizes)) as progress:
        pace = tune.Pace(asked.rounds, asked.warmup, asked.seconds or math.inf)
        for some, rows in tune.run(sizes, dtype, device, pace, asked.seed, progress):
            timings.append(some)
            chosen |= rows
            if asked.json:
                facts = machine.environment(device, _command(arguments))
                tune.write(asked.json, facts, list(itertools.chain(*timings)), chosen)
    tables.show([tune.table(some) for some in timings], _stdout(), tune.LEGEND)
    lines = ["rows for TABLE in kernels/gemm_routing.py:", *tune.lines(chosen)]
    _stdout().print("\n".join(lines), markup=False, soft_wrap=True)
    return WRONG if any(one.status == "wrong" for some in timings for one in some) else RIGHT


def _report(asked: argparse.Namespace, _: list[str]) -> int:
    results = [Results.read(file) for file in asked.files]
    if asked.html:
        _check_writable("--html", asked.html)
        _write_page(asked.html, results)
    if asked.plots:
        _make_folder("--plots", asked.plots)
        for name, figure in plots.figures(results).items():
            (asked.plots / f"{name}.svg").write_text(plots.svg(figure))
    tables.show(tables.tables(results), _stdout())
    return _verdict([record for one in results for record in one.records])


def _env(asked: argparse.Namespace, arguments: list[str]) -> int:
    facts = machine.environment(machine.device(asked.device), _command(arguments))
    _stdout().print_json(json.dumps(facts))
    return RIGHT


def _prepare(asked: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype, after checking that the files can be written."""
    device = machine.device(asked.device)
    for option, path in (("--json", asked.json), ("--html", getattr(asked, "html", None))):
        if path is not None:
            _check_writable(option, path)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    return device, asked.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def _check_writable(option: str, path: Path) -> None:
    if path.is_dir():
        raise BenchError(f"{option}: {path} is a folder")
    path = path.resolve()
    if not path.exists() or path.is_file():
        _make_folder(option, path.parent)


def _make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BenchError(f"{option}: {path} cannot be written to: {error.strerror}") from error


def _default_impls(device: torch.device, dtype: torch.dtype) -> tuple[implementations.Impl, ...]:
    """Return the implementations that `linear` measures by default.

    peft-bf16 is left out where it is the same as peft, and compiled PEFT where compiling takes
    longer than the rounds.
    """
    names = _LAYER_DEFAULTS
    if dtype in (torch.bfloat16, torch.float16):
        names += ("peft-bf16",)
    if device.type == "cuda":
        names += ("peft+compile",)
    return tuple(map(implementations.parse, names))


def _collect(
    groups: Iterator[list[Record]],
    asked: argparse.Namespace,
    device: torch.device,
    arguments: list[str],
    progress: Progress,
) -> int:
    """Collect, write and show the rows; an interruption keeps those that are finished."""
    results = Results(machine.environment(device, _command(arguments)), [])
    interrupted, unwritten = False, []
    try:
        for rows in groups:
            results.records += rows
            # Written after every problem, because the next one may crash the machine. Only the last
            # failure is reported: a full disk may have space later.
            unwritten = _write("--json", asked.json, results.write)
    except KeyboardInterrupt:
        interrupted = True
    progress.end()
    # Before the tables, because the reader of a pipe may close it.
    if results.records:
        unwritten += _write("--html", asked.html, lambda path: _write_page(path, [results]))
    tables.show(tables.tables([results]), _stdout())
    for complaint in unwritten:
        Console(stderr=True, soft_wrap=True).print(complaint, style="bold red", markup=False)
    if interrupted:
        Console(stderr=True).print(f"interrupted; {len(results.records)} finished rows are kept")
        return INTERRUPTED
    return _verdict(results.records) or (FAILED if unwritten else RIGHT)


def _write(option: str, path: Path | None, write: Callable[[Path], None]) -> list[str]:
    """Write a file, unless its path is None, and return the error message if that fails."""
    try:
        if path is not None:
            write(path)
    except OSError as error:
        return [f"{option}: {path} is not written: {error.strerror}"]
    return []


def _verdict(records: list[Record]) -> int:
    """Print every wrong row, and return the exit status."""
    wrong = [record for record in records if record.status == "wrong"]
    for record in wrong:
        message = f"WRONG {record.label}: {record.reason}"
        Console(stderr=True, soft_wrap=True).print(message, style="bold red", markup=False)
    return WRONG if wrong else RIGHT


def _write_page(path: Path, results: list[Results]) -> None:
    path.write_text(html_report.page(results))


def _command(arguments: list[str]) -> str:
    """Return the command without its output files, which say where and not what."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--json", "--html"):
            next(words, None)
        elif not word.startswith(("--json=", "--html=")):
            kept.append(word)
    return shlex.join(["lorafast-bench", *kept])


def _stdout() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PIPED_WIDTH, highlight=False)

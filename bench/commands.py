"""What each command of lorafast-bench does. Results go to stdout and files, progress and complaints to stderr."""

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

from lorafast.bench import impl as impls
from lorafast.bench import linear, machine, model, options, plots, report, tables
from lorafast.bench.contender import Problem
from lorafast.bench.progress import Progress
from lorafast.bench.record import Record, Results
from lorafast.bench.refusal import Refused

# Exit status.
RIGHT, WRONG, REFUSED, INTERRUPTED = 0, 1, 2, 130

# A table needs its width, and a pipe has none of its own.
_PIPED_WIDTH = 170

_OURS_AND_PEERS = ("frozen", "full", "lorafast", "eager", "peft")
_OF_A_MODEL = ("frozen", "lorafast", "peft")
_HALF = ("peft-bf16",)
_COMPILED = ("peft+compile",)


def main(arguments: list[str]) -> int:
    """Run one command: 0 no row is wrong, 1 a row is, 2 asked for what cannot be, 130 interrupted (finished rows are kept)."""
    asked = options.parser().parse_args(arguments)
    try:
        return {"linear": _linear, "model": _model, "tune": _tune, "report": _report, "env": _env}[
            asked.command
        ](asked, arguments)
    except Refused as error:
        Console(stderr=True, soft_wrap=True).print(
            f"lorafast-bench {asked.command}: {error}", markup=False, highlight=False
        )
        return REFUSED


def _linear(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    tokens = asked.tokens or ((512, 2048, 8192) if device.type == "cuda" else (64, 256, 1024))
    problems = tuple(
        Problem(shape.K, shape.N, R, M, p, dtype, device, asked.bias)
        for shape, R, p, M in itertools.product(asked.shape, asked.rank, asked.dropout, tokens)
    )
    plan = linear.Plan(
        problems=problems, impls=asked.impl or _defaults(device, dtype), methods=asked.methods, dropout_on=asked.dropout_on,
        rounds=asked.rounds, seconds=asked.seconds or math.inf, warmup=asked.warmup, seed=asked.seed,
    )  # fmt: skip
    with Progress(linear.progress_total(plan)) as progress:
        return _collect(linear.run(plan, progress), asked, device, arguments, progress)


def _model(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    plan = model.Plan(
        model=asked.model, impls=asked.impl or tuple(map(impls.parse, _OF_A_MODEL)), methods=asked.methods,
        batch_sizes=asked.batch_sizes, seq=asked.seq, device=device, dtype=dtype, R=asked.rank, dropout=asked.dropout,
        dropout_on=asked.dropout_on, steps=asked.steps, train_batch=asked.train_batch, lr=asked.lr, rounds=asked.rounds,
        seconds=asked.seconds or math.inf, warmup=asked.warmup, seed=asked.seed,
    )  # fmt: skip
    with Progress(model.progress_total(plan)) as progress:
        return _collect(model.run(plan, progress), asked, device, arguments, progress)


def _tune(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    try:
        from lorafast.bench import tune
    except ImportError as error:
        raise Refused(f"its kernels cannot be loaded: {error}") from error
    tune.check_able(device)
    asked_for = itertools.product(asked.shape, asked.rank, asked.dropout, asked.tokens)
    sizes = [tune.Sizes(M, shape.K, shape.N, R, p) for shape, R, p, M in asked_for]
    timings, chosen = [], {}
    with Progress(tune.progress_total(sizes)) as progress:
        pace = tune.Pace(asked.rounds, asked.warmup, asked.seconds or math.inf)
        for some, rows in tune.run(sizes, dtype, device, pace, asked.seed, progress):
            timings.append(some)
            chosen |= rows
            if asked.json:
                facts = machine.environment(device, _command(arguments))
                tune.write(asked.json, facts, list(itertools.chain.from_iterable(timings)), chosen)
    tables.show([tune.table(some) for some in timings], _out(), tune.LEGEND)
    _out().print(
        "\n".join(["rows for TABLE in kernels/routes.py:", *tune.lines(chosen)]),
        markup=False,
        soft_wrap=True,
    )
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
    tables.show(tables.tables(results), _out())
    return _verdict([record for one in results for record in one.records])


def _env(asked: argparse.Namespace, arguments: list[str]) -> int:
    facts = machine.environment(machine.device(asked.device), _command(arguments))
    _out().print_json(json.dumps(facts))
    return RIGHT


def _prepare(asked: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype to measure; what would fail after the rounds fails here."""
    device = machine.device(asked.device)
    for option, path in (("--json", asked.json), ("--html", getattr(asked, "html", None))):
        if path is not None:
            _check_writable(option, path)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    return device, asked.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def _check_writable(option: str, path: Path) -> None:
    if path.is_dir():
        raise Refused(f"{option}: {path} is a folder")
    path = path.resolve()
    if not path.exists() or path.is_file():
        _make_folder(option, path.parent)


def _make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise Refused(f"{option}: {path} cannot be written to: {error.strerror}") from error


def _defaults(device: torch.device, dtype: torch.dtype) -> tuple[impls.Impl, ...]:
    """peft-bf16 where it is another thing than peft; compiled peers where compiling is quick beside the rounds."""
    half = _HALF if dtype in (torch.bfloat16, torch.float16) else ()
    compiled = _COMPILED if device.type == "cuda" else ()
    return tuple(map(impls.parse, _OURS_AND_PEERS + half + compiled))


def _collect(
    groups: Iterator[list[Record]],
    asked: argparse.Namespace,
    device: torch.device,
    arguments: list[str],
    progress: Progress,
) -> int:
    """Take rows as they are finished; whatever ends the run, those that are finished are written and shown."""
    results = Results(machine.environment(device, _command(arguments)), [])
    interrupted, unwritten = False, []
    try:
        for rows in groups:
            results.records += rows
            # After every problem, for the next may end the machine. A disk that is full may have room then.
            unwritten = _unwritten("--json", asked.json, results.write)
    except KeyboardInterrupt:
        interrupted = True
    progress.end()
    # Files first: a reader of the tables may close the pipe.
    if results.records:
        unwritten += _unwritten("--html", asked.html, lambda path: _write_page(path, [results]))
    tables.show(tables.tables([results]), _out())
    for complaint in unwritten:
        Console(stderr=True, soft_wrap=True).print(complaint, style="bold red", markup=False)
    if interrupted:
        Console(stderr=True).print(f"interrupted; {len(results.records)} finished rows are kept")
        return INTERRUPTED
    return _verdict(results.records) or (REFUSED if unwritten else RIGHT)


def _unwritten(option: str, path: Path | None, write: Callable[[Path], None]) -> list[str]:
    """Write a file, if one is asked for; the complaint if that cannot be."""
    try:
        if path is not None:
            write(path)
    except OSError as error:
        return [f"{option}: {path} is not written: {error.strerror}"]
    return []


def _verdict(records: list[Record]) -> int:
    wrong = [record for record in records if record.status == "wrong"]
    for record in wrong:
        Console(stderr=True, soft_wrap=True).print(
            f"WRONG {record.label}: {record.reason}", style="bold red", markup=False
        )
    return WRONG if wrong else RIGHT


def _write_page(path: Path, results: list[Results]) -> None:
    path.write_text(report.page(results))


def _command(arguments: list[str]) -> str:
    """What was run, without the files it wrote: they say where, not what."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--json", "--html"):
            next(words, None)
        elif not word.startswith(("--json=", "--html=")):
            kept.append(word)
    return shlex.join(["lorafast-bench", *kept])


def _out() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_PIPED_WIDTH, highlight=False)

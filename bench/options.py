"""The options of lorafast-bench and the words they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

import lorafast
from lorafast.bench import impl as impls
from lorafast.bench import recipes, shapes
from lorafast.bench.encoder import MODELS
from lorafast.engine import checks
from lorafast.testing import SHORT

DTYPES = {name: dtype for dtype, name in SHORT.items() if dtype != torch.float64}
_LONG = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser(
        "lorafast-bench", description="What an adapted layer costs, and whether it is right."
    )
    main.add_argument("--version", action="version", version=f"lorafast {lorafast.__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str) -> argparse.ArgumentParser:
        # No abbreviations: what was run is kept beside the figures, less the names of files.
        return commands.add_parser(
            name, help=does, description=does, formatter_class=_Help, allow_abbrev=False
        )

    linear = command(
        "linear", "Measure one layer, by tokens, rank and dropout. Lists are separated by commas."
    )
    add = linear.add_argument
    add(
        "--shape",
        type=_each(shapes.parse),
        default="1024x4096",
        metavar="INxOUT,…",
        help=f"or the linears of {', '.join(shapes.MODELS)}",
    )
    add("--rank", type=_each(_count), default="16", metavar="R,…", help="ranks; alpha is 2R")
    add(
        "--tokens",
        type=_each(_count),
        metavar="M,…",
        help="tokens per batch (default: 64,256,1024, on a GPU 512,2048,8192)",
    )
    add(
        "--dropout",
        type=_each(_probability),
        default="0,0.05",
        metavar="P,…",
        help="on the adapter's input",
    )
    add("--bias", action="store_true", help="a layer with a bias")
    _common(
        linear,
        recipes.LAYERS,
        15,
        "frozen,full,lorafast,eager,peft; in half precision peft-bf16 too, on a GPU peft+compile",
    )
    model = command(
        "model",
        "Train a whole pretrained model, then step it by batch size. Lists are separated by commas.",
    )
    add = model.add_argument
    add("--model", choices=MODELS, default="minilm", help="its weights come with a package")
    add(
        "--batch-sizes",
        type=_each(_count),
        default="1,4,16",
        metavar="B,…",
        help="batch sizes to step at",
    )
    add("--seq", type=_count, default=16, metavar="TOKENS", help="tokens per text")
    add("--rank", type=_count, default=16, metavar="R", help="one rank; alpha is 2R")
    add(
        "--dropout", type=_probability, default=0.0, metavar="P", help="one, on the adapters' input"
    )
    add("--steps", type=_whole, default=200, help="training steps; 0 trains nothing")
    add("--train-batch", type=_count, default=8, metavar="B", help="batch size of training")
    add(
        "--lr",
        type=_positive,
        help="learning rate of the adapters, or of the encoder under full (default: by method); the head's is 1e-3",
    )
    _common(model, tuple(recipes.RECIPES), 7, "frozen,lorafast,peft")
    tune = command(
        "tune",
        "Check every Triton kernel, time every route of a product, and print rows for the table of routes.",
    )
    add = tune.add_argument
    told = f"or the linears of {', '.join(shapes.MODELS)}"
    add("--shape", type=_each(shapes.parse), default="4096x4096", metavar="INxOUT,…", help=told)
    add("--rank", type=_each(_count), default="16", metavar="R,…", help="ranks")
    add(
        "--tokens",
        type=_each(_count),
        default="16,512,8192",
        metavar="M,…",
        help="tokens per batch",
    )
    add(
        "--dropout",
        type=_each(_probability),
        default="0,0.05",
        metavar="P,…",
        help="on the adapter's input",
    )
    _measured(tune, 15)
    report = command("report", "Print the tables of JSON files measured before, and draw them.")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON files")
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with figures and tables"
    )
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="write every figure, as SVG")
    env = command("env", "Print the facts of this machine that stand beside every figure, as JSON.")
    env.add_argument("--device", help=_DEVICE)
    return main


_DEVICE = "cpu, cuda or cuda:INDEX (default: the GPU if there is one)"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are told, except those that are none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


def _common(
    command: argparse.ArgumentParser, methods: tuple[str, ...], rounds: int, implementations: str
) -> None:
    add = command.add_argument
    told = f"all, or some of {', '.join(methods)}"
    add(
        "--methods",
        type=_each(_among(methods)),
        default="lora,dora,lamda",
        metavar="NAME,…",
        help=told,
    )
    told = f"some of {', '.join(impls.BASES)}, each also as NAME+compile; frozen always runs (default: {implementations})"
    add("--impl", type=_each(impls.parse), metavar="NAME,…", help=told)
    add(
        "--dropout-on",
        choices=checks.DROPOUT_ON,
        default="adapter",
        help="what lorafast's DoRA drops; PEFT's is always both",
    )
    _measured(command, rounds)
    add("--html", type=Path, metavar="FILE", help="write one page with figures and tables")


def _measured(command: argparse.ArgumentParser, rounds: int) -> None:
    add = command.add_argument
    add("--dtype", type=_dtype, help=f"{', '.join(DTYPES)} (default: fp32, on a GPU bf16)")
    add("--device", help=_DEVICE)
    add("--threads", type=_count, help="torch's threads on the CPU")
    add("--rounds", type=_count, default=rounds, help="timed rounds")
    add(
        "--seconds",
        type=_positive,
        help="begin no more rounds of one problem after so long, but not before 6",
    )
    add("--warmup", type=_count, default=2, help="runs before the rounds")
    add("--seed", type=_whole, default=0, help="of weights, inputs, masks and the order of texts")
    add("--json", type=Path, metavar="FILE", help="write the rows here, after every problem")


def _each(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """A comma-separated list; what one word stands for several things is laid flat; nothing twice."""

    def parsed(text: str) -> tuple:
        found = []
        for word in text.split(","):
            value = parse(word.strip())
            found += (
                value if isinstance(value, tuple) and not hasattr(value, "_fields") else [value]
            )
        return tuple(dict.fromkeys(found))

    parsed.__name__ = "list"
    return _told(parsed)


def _told(parse: Callable[[str], object]) -> Callable[[str], object]:
    """argparse keeps the words of its own errors alone."""

    def told(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return told


def _number(text: str, kind: type, least: float, what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not value >= least or value == math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def _count(text: str) -> int:
    return _number(text, int, 1, "a whole number of at least 1")


def _whole(text: str) -> int:
    return _number(text, int, 0, "a whole number of at least 0")


def _positive(text: str) -> float:
    value = _number(text, float, 0, "a number above 0")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


@_told
def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} must be a number in [0, 1)") from None
    checks.probability(value)
    return value


@_told
def _dtype(text: str) -> torch.dtype:
    found = DTYPES.get(text) or _LONG.get(text)
    if found is None:
        raise ValueError(f"{text!r} is none of {', '.join(DTYPES)}")
    return found


def _among(methods: tuple[str, ...]) -> Callable[[str], str | tuple[str, ...]]:
    def method(text: str) -> str | tuple[str, ...]:
        if text == "all":
            return methods
        if text not in methods:
            raise ValueError(f"{text!r} is none of {', '.join(methods)}, nor all")
        return text

    return method

"""The command line of lorafast-bench: options, and the values they accept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

import lorafast
from lorafast.bench.cases import implementations, recipes, shapes
from lorafast.bench.cases.encoder import MODELS
from lorafast.engine import checks
from lorafast.testing import SHORT

DTYPES = {name: dtype for dtype, name in SHORT.items() if dtype != torch.float64}
_LONG = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_DEVICE = "cpu, cuda or cuda:INDEX (default: the GPU if there is one)"

Command = argparse.ArgumentParser


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    main = argparse.ArgumentParser(
        "lorafast-bench", description="Measure the cost of an adapted layer, and check its results."
    )
    main.add_argument("--version", action="version", version=f"lorafast {lorafast.__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str) -> Command:
        # No abbreviations: the command is stored with the results, without the names of files.
        return commands.add_parser(
            name, help=does, description=does, formatter_class=_Help, allow_abbrev=False
        )

    _linear(
        command(
            "linear",
            "Measure one layer, by tokens, rank and dropout. Lists are separated by commas.",
        )
    )
    _model(
        command(
            "model",
            "Train a whole pretrained model, then step it by batch size. "
            "Lists are separated by commas.",
        )
    )
    _tune(
        command(
            "tune",
            "Check every Triton kernel, time every route of a product, and print rows for the "
            "table of routes.",
        )
    )
    _report(command("report", "Print the tables of JSON files measured before, and draw them."))
    env = command(
        "env", "Print the facts of this machine that are stored with every result, as JSON."
    )
    env.add_argument("--device", help=_DEVICE)
    return main


def _linear(command: Command) -> None:
    _shapes(command, "1024x4096")
    add = command.add_argument
    add("--rank", type=_each(_count), default="16", metavar="R,…", help="ranks; alpha is 2R")
    help_text = "tokens per batch (default: 64,256,1024, on a GPU 512,2048,8192)"
    add("--tokens", type=_each(_count), metavar="M,…", help=help_text)
    _dropouts(command)
    add("--bias", action="store_true", help="a layer with a bias")
    default = "frozen,full,lorafast,eager,peft; in half precision peft-bf16 too, on a GPU "
    default += "peft+compile"
    _common(command, recipes.LAYERS, 15, default)


def _model(command: Command) -> None:
    add = command.add_argument
    add("--model", choices=MODELS, default="minilm", help="its weights come with a package")
    help_text = "batch sizes to step at"
    add("--batch-sizes", type=_each(_count), default="1,4,16", metavar="B,…", help=help_text)
    add("--seq", type=_count, default=16, metavar="TOKENS", help="tokens per text")
    add("--rank", type=_count, default=16, metavar="R", help="one rank; alpha is 2R")
    help_text = "one, on the adapters' input"
    add("--dropout", type=_probability, default=0.0, metavar="P", help=help_text)
    add("--steps", type=_whole, default=200, help="training steps; 0 trains nothing")
    add("--train-batch", type=_count, default=8, metavar="B", help="batch size of training")
    help_text = "learning rate of the adapters, or of the encoder under full (default: by method); "
    add("--lr", type=_positive, help=help_text + "the head's is 1e-3")
    _common(command, tuple(recipes.RECIPES), 7, "frozen,lorafast,peft")


def _tune(command: Command) -> None:
    _shapes(command, "4096x4096")
    add = command.add_argument
    add("--rank", type=_each(_count), default="16", metavar="R,…", help="ranks")
    help_text = "tokens per batch"
    add("--tokens", type=_each(_count), default="16,512,8192", metavar="M,…", help=help_text)
    _dropouts(command)
    _measured(command, 15)


def _report(command: Command) -> None:
    add = command.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="JSON files")
    _page(command)
    add("--plots", type=Path, metavar="FOLDER", help="write every figure, as SVG")


def _shapes(command: Command, default: str) -> None:
    help_text = f"or the linears of {', '.join(shapes.MODELS)}"
    command.add_argument(
        "--shape", type=_each(shapes.parse), default=default, metavar="INxOUT,…", help=help_text
    )


def _dropouts(command: Command) -> None:
    command.add_argument(
        "--dropout",
        type=_each(_probability),
        default="0,0.05",
        metavar="P,…",
        help="on the adapter's input",
    )


def _page(command: Command) -> None:
    help_text = "write one page with figures and tables"
    command.add_argument("--html", type=Path, metavar="FILE", help=help_text)


def _common(
    command: Command, methods: tuple[str, ...], rounds: int, default_implementations: str
) -> None:
    """Add the options that linear and model share."""
    add = command.add_argument
    help_text = f"all, or some of {', '.join(methods)}"
    each = _each(_among(methods))
    add("--methods", type=each, default="lora,dora,lamda", metavar="NAME,…", help=help_text)
    help_text = f"some of {', '.join(implementations.BASES)}, each also as NAME+compile; "
    help_text += f"frozen always runs (default: {default_implementations})"
    add("--impl", type=_each(implementations.parse), metavar="NAME,…", help=help_text)
    help_text = "what lorafast's DoRA drops; PEFT's is always both"
    add("--dropout-on", choices=checks.DROPOUT_ON, default="adapter", help=help_text)
    _measured(command, rounds)
    _page(command)


def _measured(command: Command, rounds: int) -> None:
    """Add the options of every command that measures."""
    add = command.add_argument
    add("--dtype", type=_dtype, help=f"{', '.join(DTYPES)} (default: fp32, on a GPU bf16)")
    add("--device", help=_DEVICE)
    add("--threads", type=_count, help="torch's threads on the CPU")
    add("--rounds", type=_count, default=rounds, help="timed rounds")
    help_text = "begin no more rounds of one problem after this time, but not before 6"
    add("--seconds", type=_positive, help=help_text)
    add("--warmup", type=_count, default=2, help="runs before the rounds")
    add("--seed", type=_whole, default=0, help="of weights, inputs, masks and the order of texts")
    add("--json", type=Path, metavar="FILE", help="write the rows here, after every problem")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _each(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """Return a parser of a comma-separated list without duplicates.

    Where `parse` returns a plain tuple, its elements join the list.
    """

    def parsed(text: str) -> tuple:
        found = []
        for word in text.split(","):
            value = parse(word.strip())
            is_list = isinstance(value, tuple) and not hasattr(value, "_fields")
            found += value if is_list else [value]
        return tuple(dict.fromkeys(found))

    parsed.__name__ = "list"
    return _with_message(parsed)


def _with_message(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return the parser with ArgumentTypeError for ValueError, whose message argparse drops."""

    def parsed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


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


@_with_message
def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} must be a number in [0, 1)") from None
    checks.probability(value)
    return value


@_with_message
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

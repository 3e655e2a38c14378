"""The implementations that are compared, by name. NAME+compile runs one through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lorafast.runtime.spelling import unknown

BASES = ("frozen", "full", "lorafast", "accelerated", "eager", "peft", "peft-bf16")
# Those that generate text; merged: lorafast's model after lorafast.merge.
GENERATING = ("frozen", "lorafast", "accelerated", "peft", "peft-bf16", "merged")
# Those whose memory is estimated.
ESTIMATED = ("frozen", "full", "lorafast", "peft", "peft-bf16")
# Those of a block; with -mlp, gated MLPs compute the input of down again.
OF_BLOCK = ("frozen", "lorafast", "lorafast-mlp", "accelerated", "accelerated-mlp", "peft")
WITHOUT_ADAPTER = ("frozen", "full")


class Impl(NamedTuple):
    """An implementation.

    base: one of BASES, GENERATING or OF_BLOCK.
    """

    base: str
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.base}+compile" if self.compile else self.base

    @property
    def has_adapter(self) -> bool:
        """True if it runs adapter methods, False if it is the bare layer."""
        return self.base not in WITHOUT_ADAPTER

    @property
    def uses_lorafast(self) -> bool:
        """True if lorafast's operations run, even in layers that PEFT has built."""
        return self.base.removesuffix("-mlp") in ("lorafast", "accelerated")

    @property
    def fuses_mlp(self) -> bool:
        """True if gated MLPs compute the input of down again in backward."""
        return self.base.endswith("-mlp")

    @property
    def built_by_peft(self) -> bool:
        """True if PEFT has built the layers, even if lorafast's operations run in them."""
        return self.base.removesuffix("-mlp") in ("accelerated", "peft", "peft-bf16")


FROZEN = Impl("frozen")
NO_METHOD = "none"
FROZEN_KEY = (FROZEN, NO_METHOD)


def parse(text: str) -> Impl:
    """Return the implementation of a name such as "peft+compile".

    Raises ValueError, with the known names, for any other text.
    """
    base, plus, tail = text.partition("+")
    if base not in BASES or (plus and tail != "compile"):
        raise ValueError(unknown(text, BASES, ", nor one of them with +compile"))
    return Impl(base, bool(plus))


def parse_one_of(names: tuple[str, ...]) -> Callable[[str], Impl]:
    """Return a function from one of the names to its implementation, ValueError for another."""

    def parsed(text: str) -> Impl:
        if text not in names:
            raise ValueError(unknown(text, names))
        return Impl(text)

    return parsed


def candidates(impls: tuple[Impl, ...], methods: tuple[str, ...]) -> tuple[tuple[Impl, str], ...]:
    """Return implementation and method of every row of one problem, the frozen layer first."""
    keys = [FROZEN_KEY]
    for impl in impls:
        if impl != FROZEN:
            keys += [(impl, method) for method in (methods if impl.has_adapter else (NO_METHOD,))]
    return tuple(keys)

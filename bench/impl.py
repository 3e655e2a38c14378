"""Implementations by name: what is put beside what. `+compile` after any of them runs it through torch.compile."""

from __future__ import annotations

from typing import NamedTuple

BASES = ("frozen", "full", "lorafast", "accelerated", "eager", "peft", "peft-bf16")
WITHOUT_ADAPTER = ("frozen", "full")


class Impl(NamedTuple):
    """base: one of BASES."""

    base: str
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.base}+compile" if self.compile else self.base

    @property
    def adapts(self) -> bool:
        """Whether it runs adapter methods, rather than the bare layer."""
        return self.base not in WITHOUT_ADAPTER

    @property
    def ours(self) -> bool:
        """Whether lorafast's ops run, whoever built the layers."""
        return self.base in ("lorafast", "accelerated")

    @property
    def by_peft(self) -> bool:
        """Whether PEFT built the layers, whoever's ops run."""
        return self.base in ("accelerated", "peft", "peft-bf16")


FROZEN = Impl("frozen")
NO_METHOD = "none"
FROZEN_KEY = (FROZEN, NO_METHOD)


def parse(text: str) -> Impl:
    """ "peft+compile" and the like. ValueError listing what there is."""
    base, plus, tail = text.partition("+")
    if base not in BASES or (plus and tail != "compile"):
        raise ValueError(f"{text!r} is none of {', '.join(BASES)}, nor one of them with +compile")
    return Impl(base, bool(plus))


def contenders(impls: tuple[Impl, ...], methods: tuple[str, ...]) -> tuple[tuple[Impl, str], ...]:
    """Implementation and method of every row of one problem, the bare frozen layer always first."""
    named = (one for one in impls if one != FROZEN)
    return (
        FROZEN_KEY,
        *((one, method) for one in named for method in (methods if one.adapts else (NO_METHOD,))),
    )

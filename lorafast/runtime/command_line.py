"""Parsers of command lines, whose errors are one line that names the nearest word.

Imports no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from lorafast.runtime.spelling import did_you_mean, unknown


class Command(argparse.ArgumentParser):
    """A parser that takes no abbreviation, and whose errors are one line, without the usage."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        # A result is stored with its command, and options may be added that begin alike.
        super().__init__(prog, allow_abbrev=False, **options)

    @property
    def option_names(self) -> list[str]:
        """The options that the parser knows, such as --tokens."""
        return [name for action in self._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        """End the program with a message and exit status 2."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")

    def refuse_option(self, word: str) -> NoReturn:
        """End the program because the word is no option; the message names the nearest one."""
        near = did_you_mean(word.partition("=")[0], self.option_names)
        self.error(f"{word!r} is no option{near or f'; {self.prog} --help lists them'}")


def parse(main: Command, commands: Mapping[str, Command], words: list[str]) -> argparse.Namespace:
    """Return the command and its options.

    A word that is not known ends the program with one line on stderr, which names the nearest one,
    and exit status 2.

    Args:
        main: the parser of the whole command line; its options take no values, and it stores the
            command under that name.
        commands: the parser of each command.
        words: the command line without the program.
    """
    for word in words:
        if not word.startswith("-"):
            if word not in commands:
                main.error(unknown(word, commands))
            break
        if word not in main.option_names:
            main.refuse_option(word)
    asked, rest = main.parse_known_args(words)
    if asked.command is None:
        main.error(f"COMMAND is missing, one of {', '.join(commands)}")
    if rest:
        commands[asked.command].refuse_option(rest[0])
    return asked


def split_at_program(parser: Command, words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words that are the parser's own options, and those from the program on.

    A program is a word that is no option, or -m and what follows it.
    """
    takes_value = {
        name for action in parser._actions for name in action.option_strings if action.nargs is None
    }
    i = 0
    while i < len(words) and words[i] != "-m" and words[i].startswith("-"):
        i += 2 if words[i] in takes_value else 1
    return words[:i], words[i:]


def with_message(parse_word: Callable[[str], object]) -> Callable[[str], object]:
    """Return the parser with ArgumentTypeError for ValueError, whose message argparse drops."""

    def parsed(text: str) -> object:
        try:
            return parse_word(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def one_of(known: Iterable[str], everything: str | None = None) -> Callable[[str], object]:
    """Return a parser of one of these words; the word `everything` is all of them."""
    words = tuple(known)

    @with_message
    def word(text: str) -> str | tuple[str, ...]:
        if text == everything:
            return words
        if text not in words:
            raise ValueError(unknown(text, words, f", nor {everything}" if everything else ""))
        return text

    return word

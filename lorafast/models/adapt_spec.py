"""What adapt is asked to do: an adapter, where it goes, where it differs, and what else trains."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from lorafast.engine import checks
from lorafast.methods.adapter import Adapter
from lorafast.models import expressions

BIASES = ("none", "all", "lora_only")
# What PEFT reads the same way: every linear but the head that makes logits.
ALL_LINEAR = "all-linear"

# Where PEFT puts a rank or alpha pattern.
_ENDING = r"(.*\.)?(%s)$"

Names = str | Collection[str]


@dataclass(frozen=True)
class Plan:
    """The fields mean what PEFT's of the same names mean.

    forgiving: names and patterns that match nothing are passed over, as PEFT does, as long as some layer is adapted. loose: a name
    in modules_to_save also means every module whose name ends in these letters, as PEFT reads it ("norm": input_layernorm too).
    foreign: its expressions come from a file. untie: a module to save that is tied to another gets tensors of its own, as in PEFT.
    """

    adapter: Adapter
    target_modules: Names = ALL_LINEAR
    exclude_modules: Names | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_pattern: Mapping[str, Adapter] = field(default_factory=dict)
    modules_to_save: Collection[str] = ()
    bias: str = "none"
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    task_type: str | None = None
    forgiving: bool = False
    loose: bool = False
    foreign: bool = False
    untie: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, Adapter):
            raise TypeError(
                f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {self.adapter!r}"
            )
        checks.word("bias", self.bias, BIASES)
        _refuse_names(
            "target_modules",
            self.target_modules,
            "'all-linear', a regular expression or names of modules",
        )
        if self.exclude_modules:
            _refuse_names(
                "exclude_modules", self.exclude_modules, "a regular expression or names of modules"
            )
        for name, kind, what in (
            ("modules_to_save", str, "names of modules"),
            ("layers_to_transform", int, "indices"),
            ("layers_pattern", str, "names"),
        ):
            given = getattr(self, name)
            if given is not None and not _all_of(kind, given):
                raise ValueError(f"{name}={given!r} must be a list of {what}")
        for pattern in self.layers_pattern:
            expressions.compiled("layers_pattern", pattern)
            if self.foreign and not expressions.is_plain(pattern):
                raise ValueError(f"layers_pattern={pattern[:200]!r} of a file must be a name")
        self._refuse_adapters()
        for name in ("rank_pattern", "alpha_pattern"):
            self._refuse_pattern(name)

    def _refuse_adapters(self) -> None:
        pattern = self.adapter_pattern
        if not isinstance(pattern, Mapping) or not all(
            isinstance(one, Adapter) for one in pattern.values()
        ):
            raise TypeError(
                f"adapter_pattern={pattern!r} must be a dict from regular expressions to lorafast adapters"
            )
        for key in pattern:
            expressions.compiled("adapter_pattern", key, _ENDING)
        if pattern and (
            shares := next(
                (one for one in self._kinds() if one.bind_model([(1, 1)]) is not one), None
            )
        ):
            raise ValueError(
                f"adapter_pattern={pattern!r}: all layers of {type(shares).__name__} share tensors"
            )

    def _kinds(self) -> tuple[Adapter, ...]:
        return self.adapter, *self.adapter_pattern.values()

    def _refuse_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if not isinstance(pattern, Mapping):
            raise ValueError(
                f"{name}={pattern!r} must be a dict from regular expressions to numbers"
            )
        what = "r" if name == "rank_pattern" else "alpha"
        for adapter in self._kinds() if pattern else ():
            if what not in {f.name for f in fields(adapter)}.intersection(adapter.per_layer):
                raise ValueError(
                    f"{name}={pattern!r}: {type(adapter).__name__} has no {what} of its own per layer"
                )
            if what == "r" and adapter.bind_model([(1, 1)]) is not adapter:
                raise ValueError(
                    f"{name}={pattern!r}: the layers of {type(adapter).__name__} share tensors of one rank"
                )
        for key, value in pattern.items():
            expressions.compiled(name, key, _ENDING)
            for adapter in self._kinds():
                try:
                    replace(adapter, **{what: value})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}[{key!r}]={value!r}: {error}") from error

    def adapters(self, names: Iterable[str]) -> dict[str, Adapter]:
        """The adapter of each layer: method, rank and alpha by the first pattern each that matches its name, or its end after a
        dot.
        """
        names, own = list(names), collections.defaultdict(dict)
        kinds = {
            name: self.adapter_pattern[key]
            for name, key in matching(self.adapter_pattern, names, self.foreign).items()
        }
        for what, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            for name, key in matching(pattern, names, self.foreign).items():
                own[name][what] = pattern[key]
        kinds = {name: kinds.get(name, self.adapter) for name in names}
        return {
            name: replace(kinds[name], **own[name]) if name in own else kinds[name]
            for name in names
        }


def matching(
    pattern: Mapping[str, object], names: Iterable[str], foreign: bool = False
) -> dict[str, str]:
    """For each name, the first key of a pattern that matches it, whole or after a dot; others are left out."""
    names, keys = list(names), list(pattern)
    if all(map(expressions.is_plain, keys)):
        found = {
            name: next((key for key in keys if expressions.plain_ends(key, name)), None)
            for name in names
        }
        return {name: key for name, key in found.items() if key is not None}
    placed = expressions.first([_ENDING % key for key in keys], names, foreign, whole=False)
    return {name: keys[index] for name, index in placed.items()}


def _refuse_names(argument: str, names: Names, wanted: str) -> None:
    if isinstance(names, str):
        expressions.compiled(argument, names)
    elif not names or not _all_of(str, names):
        raise ValueError(f"{argument}={names!r} must be {wanted}")


def _all_of(kind: type, given: object) -> bool:
    """Whether this is a list, tuple or set of (not empty) strings, or of numbers."""
    if isinstance(given, str | Mapping) or not isinstance(given, Collection):
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) and one != "" for one in given)

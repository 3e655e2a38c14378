"""What adapt is asked to do: an adapter, where it goes, where it differs, and what else trains."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace

from lorafast import checks
from lorafast.methods.adapter import Adapter

BIASES = ("none", "all", "lora_only")
# What PEFT reads the same way: every linear but the head that makes logits.
ALL_LINEAR = "all-linear"

Names = str | Collection[str]


@dataclass(frozen=True)
class Plan:
    """The fields mean what PEFT's of the same names mean.

    forgiving: names and patterns that match nothing are passed over, as PEFT does, as long as some layer is adapted. loose: a name
    in modules_to_save also means every module whose name ends in these letters, as PEFT reads it ("norm": input_layernorm too).
    """

    adapter: Adapter
    target_modules: Names = ALL_LINEAR
    exclude_modules: Names | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Collection[str] = ()
    bias: str = "none"
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    task_type: str | None = None
    forgiving: bool = False
    loose: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, Adapter):
            raise TypeError(f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {self.adapter!r}")
        checks.word("bias", self.bias, BIASES)
        _refuse_names("target_modules", self.target_modules, "'all-linear', a regular expression or names of modules")
        if self.exclude_modules:
            _refuse_names("exclude_modules", self.exclude_modules, "a regular expression or names of modules")
        for name, kind, what in (
            ("modules_to_save", str, "names of modules"),
            ("layers_to_transform", int, "indices"),
            ("layers_pattern", str, "names"),
        ):
            given = getattr(self, name)
            if given is not None and not _all_of(kind, given):
                raise ValueError(f"{name}={given!r} must be a list of {what}")
        for pattern in self.layers_pattern:
            _compiled("layers_pattern", pattern)
        for name in ("rank_pattern", "alpha_pattern"):
            self._refuse_pattern(name)

    def _refuse_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{name}={pattern!r} must be a dict from regular expressions to numbers")
        what = "r" if name == "rank_pattern" else "alpha"
        if pattern and what not in {f.name for f in fields(self.adapter)}:
            raise ValueError(f"{name}={pattern!r}: {type(self.adapter).__name__} has no {what} of its own per layer")
        if pattern and what == "r" and self.adapter.fitted([(1, 1)]) is not self.adapter:
            raise ValueError(f"{name}={pattern!r}: the layers of {type(self.adapter).__name__} share tensors of one rank")
        for key, value in pattern.items():
            _compiled(name, key)
            try:
                replace(self.adapter, **{what: value})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}[{key!r}]={value!r}: {error}") from error

    def adapter_of(self, name: str) -> Adapter:
        """The adapter of the layer of this name: rank and alpha each by the first pattern that matches."""
        own = {}
        for what, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            if (key := matching(pattern, name)) is not None:
                own[what] = pattern[key]
        return replace(self.adapter, **own) if own else self.adapter


def matching(pattern: Mapping[str, float], name: str) -> str | None:
    """The first key of a rank or alpha pattern that matches a name, whole or after a dot."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def _refuse_names(argument: str, names: Names, wanted: str) -> None:
    if isinstance(names, str):
        _compiled(argument, names)
    elif not names or not _all_of(str, names):
        raise ValueError(f"{argument}={names!r} must be {wanted}")


def _all_of(kind: type, given: object) -> bool:
    """Whether this is a list, tuple or set of (not empty) strings, or of numbers."""
    if isinstance(given, str | Mapping) or not isinstance(given, Collection):
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) and one != "" for one in given)


def _compiled(argument: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{argument}={pattern!r} is no regular expression: {error}") from error

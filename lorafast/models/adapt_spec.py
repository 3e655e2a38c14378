"""AdaptSpec: which adapter goes on which layers, where it differs, and what else trains."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lorafast.engine import checks
from lorafast.methods.adapter import Adapter
from lorafast.models import expressions

BIAS_OPTIONS = ("none", "all", "lora_only")
# PEFT's word for every linear layer except the head that makes logits.
ALL_LINEAR = "all-linear"
# Attribute of an adapted model: the task_type of its spec, for the config of its adapter file.
TASK_TYPE_ATTRIBUTE = "_lorafast_task_type"

# A regular expression that matches whole names, or names that each match a whole name or its end.
ModuleSelector = str | Collection[str]


@dataclass(frozen=True)
class AdaptSpec:
    """The arguments of adapt, checked. Fields that PEFT's config has too mean what they mean there.

    Attributes:
        target_modules: may be empty beside target_parameters.
        target_parameters: names of experts' Parameters, or their ends after a dot.
        ignore_unmatched: names and patterns that match nothing are ignored, as in PEFT, as long as
            some layer is adapted.
        match_any_ending: a name in modules_to_save also selects every module whose name ends in
            these letters, as in PEFT ("norm" selects input_layernorm).
        untrusted: regular expressions come from a file.
        untie: a module to save that is tied to another module gets its own tensors, as in PEFT.
        keep_ties: modules tied to a module to save train and are saved with it.
    """

    adapter: Adapter
    target_modules: ModuleSelector = ALL_LINEAR
    exclude_modules: ModuleSelector | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    adapter_pattern: Mapping[str, Adapter] = field(default_factory=dict)
    modules_to_save: Collection[str] = ()
    bias: str = "none"
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()
    task_type: str | None = None
    ignore_unmatched: bool = False
    match_any_ending: bool = False
    untrusted: bool = False
    untie: bool = False
    keep_ties: bool = False
    target_parameters: Collection[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, Adapter):
            raise TypeError(
                "adapter must be a lorafast adapter such as lorafast.LoRA(r=8), "
                f"not {self.adapter!r}"
            )
        checks.word("bias", self.bias, BIAS_OPTIONS)
        forms = "a regular expression or names of modules"
        if self.target_modules or not self.target_parameters:
            _check_selector("target_modules", self.target_modules, f"'all-linear', {forms}")
        if self.exclude_modules:
            _check_selector("exclude_modules", self.exclude_modules, forms)
        self._check_lists()
        self._check_adapter_pattern()
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_number_pattern(name)

    @property
    def targets_all_linear(self) -> bool:
        """True if target_modules is "all-linear"."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def adapters(self, names: Iterable[str]) -> dict[str, Adapter]:
        """Return the adapter of each named layer.

        The method, the rank and alpha each come from the first pattern that matches the name or its
        end after a dot.
        """
        names = list(names)
        numbers: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        keys = match_patterns(self.adapter_pattern, names, self.untrusted)
        for argument, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            for name, key in match_patterns(pattern, names, self.untrusted).items():
                numbers[name][argument] = pattern[key]
        adapters = {
            name: self.adapter_pattern[keys[name]] if name in keys else self.adapter
            for name in names
        }
        return {
            name: replace(adapter, **numbers[name]) if name in numbers else adapter
            for name, adapter in adapters.items()
        }

    def _check_lists(self) -> None:
        for name, kind, plural in (
            ("modules_to_save", str, "names of modules"),
            ("target_parameters", str, "names of Parameters"),
            ("layers_to_transform", int, "indices"),
            ("layers_pattern", str, "names"),
        ):
            value = getattr(self, name)
            if value is not None and not _is_collection_of(kind, value):
                raise ValueError(f"{name}={value!r} must be a list of {plural}")
        for pattern in self.layers_pattern:
            expressions.check_expression("layers_pattern", pattern)
            if self.untrusted and not expressions.is_plain(pattern):
                raise ValueError(f"layers_pattern={pattern[:200]!r} of a file must be a name")

    def _check_adapter_pattern(self) -> None:
        pattern = self.adapter_pattern
        if not isinstance(pattern, Mapping) or not all(
            isinstance(adapter, Adapter) for adapter in pattern.values()
        ):
            raise TypeError(
                f"adapter_pattern={pattern!r} must be a dict from regular expressions to lorafast "
                "adapters"
            )
        for key in pattern:
            expressions.check_expression("adapter_pattern", key, ends=True)
        for adapter in self._all_adapters() if pattern else ():
            if _shares_tensors(adapter):
                raise ValueError(
                    f"adapter_pattern={pattern!r}: all layers of {type(adapter).__name__} share "
                    "tensors"
                )

    def _check_number_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if not isinstance(pattern, Mapping):
            raise ValueError(
                f"{name}={pattern!r} must be a dict from regular expressions to numbers"
            )
        argument = "r" if name == "rank_pattern" else "alpha"
        for adapter in self._all_adapters() if pattern else ():
            arguments = {f.name for f in fields(adapter)}.intersection(adapter.per_layer_fields)
            if argument not in arguments:
                raise ValueError(
                    f"{name}={pattern!r}: {type(adapter).__name__} has no {argument} of its own "
                    "per layer"
                )
            if argument == "r" and _shares_tensors(adapter):
                raise ValueError(
                    f"{name}={pattern!r}: the layers of {type(adapter).__name__} share tensors of "
                    "one rank"
                )
        for key, value in pattern.items():
            expressions.check_expression(name, key, ends=True)
            for adapter in self._all_adapters():
                try:
                    replace(adapter, **{argument: value})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}[{key!r}]={value!r}: {error}") from error

    def _all_adapters(self) -> tuple[Adapter, ...]:
        return self.adapter, *self.adapter_pattern.values()


def match_patterns(
    pattern: Mapping[str, object], names: Iterable[str], untrusted: bool = False
) -> dict[str, str]:
    """Return, for each name, the first key that matches it or its end after a dot.

    Names that no key matches are left out. untrusted: the keys come from a file.
    """
    keys = list(pattern)
    indices = expressions.first_matches(keys, names, untrusted, ends=True)
    return {name: keys[index] for name, index in indices.items()}


def _shares_tensors(adapter: Adapter) -> bool:
    """True if the layers of one model hold tensors of the adapter in common (VeRA)."""
    return adapter.bind_model([(1, 1)]) is not adapter


def _check_selector(argument: str, selector: ModuleSelector, expected: str) -> None:
    if isinstance(selector, str):
        expressions.check_expression(argument, selector)
    elif not selector or not _is_collection_of(str, selector):
        raise ValueError(f"{argument}={selector!r} must be {expected}")


def _is_collection_of(kind: type, value: object) -> bool:
    """True for a list, tuple or set of non-empty strings, or of integers."""
    if isinstance(value, str | Mapping) or not isinstance(value, Collection):
        return False
    return all(
        isinstance(item, kind) and not isinstance(item, bool) and item != "" for item in value
    )

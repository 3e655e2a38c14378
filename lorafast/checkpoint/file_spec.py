"""The AdaptSpec that an adapter file asks for, and the base model that it was made for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lorafast.checkpoint import file_format, files, keys
from lorafast.methods.dora import DoRA
from lorafast.models import peft_config
from lorafast.models.adapt_spec import AdaptSpec


def spec_of_file(file: files.AdapterFile) -> AdaptSpec:
    """Return the AdaptSpec of a file. What save_adapter stacked has its own rank and s again.

    Raises:
        ValueError, TypeError: config or metadata are wrong. Names the field.
    """
    try:
        spec = peft_config.spec_from_config(file.config, loading=True)
        # lorafast writes the full names of modules to save, PEFT their ends.
        spec = replace(spec, match_any_ending=not file.extras)
        if file.extras.get("stacked"):
            return _unstacked_spec(spec, file)
        adapter = file_format.apply_extras(spec.adapter, file.extras)
        return _with_magnitude_only(replace(spec, adapter=adapter), file)
    except OverflowError as error:
        raise ValueError(f"{files.CONFIG}: a number is too large: {error}") from error


def _unstacked_spec(spec: AdaptSpec, file: files.AdapterFile) -> AdaptSpec:
    """Return the spec with the ranks and alphas that the layers had before they were stacked."""
    ranks = {"r": spec.adapter.r} | dict(spec.rank_pattern)
    if odd := {key: r for key, r in ranks.items() if r % 2}:
        raise ValueError(f"{files.CONFIG}: {odd} are odd, and cannot be ranks with their starts")
    alpha, alpha_pattern = file.extras.get("alpha"), file.extras.get("alpha_pattern")
    if not isinstance(alpha_pattern, Mapping):
        raise ValueError(
            f"{files.WEIGHTS} metadata: alpha_pattern={alpha_pattern!r} must be a dict"
        )
    half = replace(spec.adapter, r=spec.adapter.r // 2, alpha=alpha)
    adapter = file_format.apply_extras(half, file.extras)
    stacked = file_format.stacked_adapter(adapter)
    if not adapter.residual or stacked.scaling != spec.adapter.scaling:
        raise ValueError(
            f"{files.CONFIG} says {spec.adapter}, {files.WEIGHTS} was written for {stacked}"
        )
    return replace(
        spec,
        adapter=adapter,
        rank_pattern={key: r // 2 for key, r in spec.rank_pattern.items()},
        alpha_pattern=alpha_pattern,
    )


def _with_magnitude_only(spec: AdaptSpec, file: files.AdapterFile) -> AdaptSpec:
    """Return the spec with DoRA(magnitude_only=True) on the layers that the file lists."""
    names = file.extras.get("magnitude_only", [])
    layers = keys.group_keys(file.entries).layers
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name in layers for name in names
    ):
        raise ValueError(
            f"{files.WEIGHTS} metadata: magnitude_only={str(names)[:200]} must be names of layers "
            "in the file"
        )
    if not names:
        return spec
    if not isinstance(spec.adapter, DoRA) or spec.adapter.residual:
        raise ValueError(
            f"{files.WEIGHTS} metadata: magnitude_only={str(names)[:200]} beside {spec.adapter}"
        )
    magnitude_only = spec.adapter.without_factors()
    return replace(spec, adapter_pattern={f"^{re.escape(name)}": magnitude_only for name in names})


def refuse_other_base(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ValueError if the config names another base model than model.name_or_path.

    Names are compared by their last part, without case; an unknown name is no difference.
    """
    file_base, model_base = (
        config.get("base_model_name_or_path"),
        getattr(model, "name_or_path", None),
    )
    known = all(isinstance(name, str) and name for name in (file_base, model_base))
    if known and _last_part(file_base) != _last_part(model_base):
        raise ValueError(
            f"base_model_name_or_path: the adapter is for {file_base!r}, the model is "
            f"{model_base!r}; if they fit, check_base=False"
        )


def _last_part(name: str) -> str:
    """Return the last part of a hub id or path; of a path in the hub's cache, that of its id."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", name)
    return (cached.group(1) if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()

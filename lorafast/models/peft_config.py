"""PEFT's configs to and from AdaptSpec: the dict that adapter_config.json holds.

PEFT is not imported, except where a PEFT config is given: for its default target modules, and for
the fused experts that it means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter
from lorafast.methods.aflora import AFLoRA
from lorafast.methods.dora import DoRA
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora import LoRA
from lorafast.methods.pissa import PiSSA
from lorafast.methods.vera import VeRA
from lorafast.models import adalora_format, fused_experts, task_heads
from lorafast.models.adapt_spec import AdaptSpec

# peft_type of methods that PEFT lacks, so that PEFT refuses them instead of reading another method.
# A PEFT without lorafast says nothing but KeyError and this word, so the word says what is missing.
LAMDA = "LAMDA_NEEDS_IMPORT_LORAFAST"
DORA_IN, AFLORA = "LORAFAST_DORA_IN", "LORAFAST_AFLORA"
# LaMDA's in files of before.
OLD_LAMDA = "LAMDA"

# Fields that do not change what a layer computes: who wrote the file and for what, or how weights
# are laid out.
_IGNORED_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "megatron_core",
    "merge_weights",  # of PEFT before 0.3, which merged in eval
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "save_projection",
    "task_type",
    "use_lamda",
)
# Inits of PEFT's that leave the weight unchanged, so that their files load like any LoRA; and the
# fields that configure an init.
_FOREIGN_INITS = ("eva", "orthogonal")
# Inits that change the weight, and that PEFT repeats when it loads a file of theirs.
_WEIGHT_CHANGING_INITS = ("corda", "lora_ga", "olora")
_INIT_CONFIGS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")
# Fields that change how an adapter trains, and not what a file of it computes.
_TRAINING_FIELDS = ("velora_config",)
# Fields of an AdaptSpec that a config has under the same name.
_SPEC_FIELDS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "layers_to_transform",
    "layers_pattern",
)


def is_peft_config(adapter: object) -> bool:
    """True if the object is a PEFT config. Does not import PEFT."""
    return hasattr(adapter, "peft_type") and callable(getattr(adapter, "to_dict", None))


def complete_config(config: Any, model: nn.Module) -> dict[str, Any]:
    """Return a PEFT config as a dict, with what PEFT fills in from the model.

    That is target_modules, if None, the experts that they mean, and the heads that a task trains.
    ValueError if they mean routers.
    """
    config = fused_experts.converted(config, model)
    values = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    if values.get("use_lamda"):
        values["peft_type"] = LAMDA
    if values.get("target_modules") is None:
        has_parameters = bool(values.get("target_parameters"))
        values["target_modules"] = _default_targets(values["peft_type"], model, has_parameters)
    saved, task_type = values.get("modules_to_save") or (), values.get("task_type")
    values["modules_to_save"] = list(task_heads.add_heads(model, task_type, saved))
    return values


def _default_targets(peft_type: str, model: nn.Module, has_parameters: bool) -> Any:
    from peft.utils import constants

    method = peft_type if peft_type in ("VERA", "ADALORA") else "LORA"
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in table and has_parameters:
        return ()
    if model_type not in table:
        raise ValueError(
            f"target_modules is None, and PEFT has no default for a model of type {model_type!r}: "
            "name them"
        )
    return table[model_type]


def spec_from_config(config: dict[str, Any], loading: bool = False) -> AdaptSpec:
    """Return the AdaptSpec that a config asks for.

    Args:
        config: the fields of a PEFT config, or of an adapter_config.json.
        loading: tensors come from a file, whose config is untrusted; an init matters only if it
            changes the weight.

    Raises:
        ValueError: a method or a field that lorafast lacks, or a wrong value. Names the field.
        TypeError: a value of the wrong type. Names the field.
    """
    peft_type = config.get("peft_type")
    readers: dict[str, Callable] = {
        "LORA": _read_lora,
        "VERA": _read_vera,
        "ADALORA": _read_adalora,
        LAMDA: _read_lamda,
        OLD_LAMDA: _read_lamda,
        DORA_IN: _read_dora_in,
        AFLORA: _read_aflora,
    }
    if not isinstance(peft_type, str) or peft_type not in readers:
        raise ValueError(f"peft_type={peft_type!r} must be one of {', '.join(map(repr, readers))}")
    fields = {key: value for key, value in config.items() if key not in _IGNORED_FIELDS}
    adapter = readers[peft_type](_Fields(fields), loading)
    if isinstance(adapter, AdaLoRA) and fields.get("rank_pattern"):
        fields["rank_pattern"] = adalora_format.rank_pattern_from_peft(
            fields["rank_pattern"], adapter.init_r
        )
    keep_ties = _Fields(fields).pop("ensure_weight_tying", False, bool)
    arguments = _take_spec_fields(fields)
    _refuse_unknown_fields(fields, loading)
    if not isinstance(config.get("task_type"), str | None):
        raise TypeError(f"task_type={config['task_type']!r} must be a word")
    return AdaptSpec(
        adapter,
        **arguments,
        task_type=config.get("task_type"),
        ignore_unmatched=True,
        match_any_ending=True,
        untrusted=loading,
        untie=not keep_ties,
        keep_ties=keep_ties,
    )


def _take_spec_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields that AdaptSpec has too, and return them in its types."""
    arguments = {key: fields.pop(key) for key in _SPEC_FIELDS if fields.get(key) is not None}
    for key, kind in (("layers_to_transform", int), ("layers_pattern", str)):
        if isinstance(arguments.get(key), kind):
            arguments[key] = [arguments[key]]
    if arguments.get("bias") == "vera_only":
        arguments["bias"] = "lora_only"
    for key in ("target_modules", "target_parameters"):
        if isinstance(arguments.get(key), set):
            arguments[key] = sorted(arguments[key])
    if arguments.get("target_parameters"):
        # None means no layers beside them: where PEFT has a default, it writes that.
        arguments.setdefault("target_modules", ())
    return arguments


def _refuse_unknown_fields(fields: dict[str, Any], loading: bool) -> None:
    """Raise ValueError if a field that no reader took has a value."""
    # The readers have refused the inits that lorafast lacks; without its init a field does nothing.
    harmless = (*_SPEC_FIELDS, *_INIT_CONFIGS, *(_TRAINING_FIELDS if loading else ()))
    unknown = sorted(key for key, value in fields.items() if value and key not in harmless)
    if unknown:
        shown = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
        raise ValueError(f"{shown}: lorafast has no such thing")


class _Fields:
    """The fields of a config. pop() removes one and checks its type."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def pop(self, name: str, default: Any, *kinds: type) -> Any:
        value = self._fields.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(
                f"{name}={value!r} must be {' or '.join(kind.__name__ for kind in kinds)}"
            )
        return value


def _read_scaled(fields: _Fields) -> dict[str, Any]:
    return {
        "r": fields.pop("r", 8, int),
        "alpha": fields.pop("lora_alpha", 8, int, float),
        "dropout": fields.pop("lora_dropout", 0.0, int, float),
        "rslora": fields.pop("use_rslora", False, bool),
    }


def _read_lora(fields: _Fields, loading: bool) -> Adapter:
    arguments = _read_scaled(fields) | {"lora_bias": fields.pop("lora_bias", False, bool)}
    arguments["init"] = _read_init(fields.pop("init_lora_weights", True, bool, str), loading)
    if not fields.pop("use_dora", False, bool):
        return LoRA(**arguments)
    return DoRA(**arguments, dropout_on="both" if arguments["dropout"] else "adapter")


def _read_init(init: bool | str, loading: bool) -> str | PiSSA:
    if init is True or (loading and (init is False or init in _FOREIGN_INITS)):
        return "kaiming"
    if init == "gaussian":
        return init
    if init == "pissa":
        return PiSSA(0)
    if isinstance(init, str) and (niter := re.fullmatch(r"pissa_niter_([0-9]{1,4})", init)):
        if loading:
            raise ValueError(
                f"init_lora_weights={init!r}: what PEFT took out of the weights was drawn at "
                "random and is not in the file; save it from PEFT with "
                "path_initial_model_for_weight_conversion"
            )
        return PiSSA(int(niter[1]))
    if loading and init in _WEIGHT_CHANGING_INITS:
        why = (
            "what PEFT took out of the weights is not in the file; save it from PEFT with "
            "path_initial_model_for_weight_conversion"
        )
    elif init == "lora_ga":
        why = (
            "no config holds gradients; adapt with "
            "lorafast.LoRA(init=lorafast.LoRAGA(gradients, compat='peft'))"
        )
    else:
        verb = "load" if loading else "start"
        why = f"lorafast has no such init: {verb} the model in PEFT, and lorafast.accelerate it"
    raise ValueError(f"init_lora_weights={init!r}: {why}")


def _read_dora_in(fields: _Fields, loading: bool) -> Adapter:
    arguments = _read_scaled(fields) | {"lora_bias": fields.pop("lora_bias", False, bool)}
    fields.pop("use_dora", True, bool)
    init = _read_init(fields.pop("init_lora_weights", True, bool, str), loading)
    return DoRA(**arguments, init=init, axis="in")


def _read_lamda(fields: _Fields, loading: bool) -> Adapter:
    fields.pop("init_lora_weights", True, bool, str)
    return LaMDA(
        **_read_scaled(fields),
        init=fields.pop("lamda_init", "residual", str),
        svd_niter=fields.pop("svd_niter", None, int),
    )


def _read_vera(fields: _Fields, loading: bool) -> Adapter:
    return VeRA(
        r=fields.pop("r", 256, int),
        d_initial=fields.pop("d_initial", 0.1, int, float),
        dropout=fields.pop("vera_dropout", 0.0, int, float),
        projection_prng_key=fields.pop("projection_prng_key", 0, int),
    )


def _read_adalora(fields: _Fields, loading: bool) -> Adapter:
    init = fields.pop("init_lora_weights", True, bool, str)
    fields.pop("r", 8, int)  # LoraConfig's r, which AdaLoRA does not use
    for name, default in adalora_format.SCHEDULE_FIELDS.items():
        fields.pop(name, default, int, float)
    r, target_r = fields.pop("init_r", 12, int), fields.pop("target_r", 8, int)
    if loading:
        # PEFT ignores these for AdaLoRA, so no tensor of a file depends on them.
        for name in ("use_rslora", "alpha_pattern"):
            fields.pop(name, None, bool, dict)
        target_r = min(target_r, r)
    elif init is not True:
        raise ValueError(
            f"init_lora_weights={init!r}: AdaLoRA has one start, A and B normal and E at 0; say "
            "True"
        )
    return AdaLoRA(
        r=r,
        target_r=target_r,
        alpha=fields.pop("lora_alpha", 8, int, float),
        dropout=fields.pop("lora_dropout", 0.0, int, float),
    )


def _read_aflora(fields: _Fields, loading: bool) -> Adapter:
    return AFLoRA(
        r=fields.pop("r", 4, int),
        d_initial=fields.pop("d_initial", 1.0, int, float),
        dropout=fields.pop("lora_dropout", 0.0, int, float),
    )


def config_from_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of a config that describe an adapter.

    The init is written as one that leaves the weight unchanged, because an adapter file fits the
    original weights (see checkpoint.file_format).
    """
    if isinstance(adapter, VeRA):
        return {
            "peft_type": "VERA",
            "r": adapter.r,
            "d_initial": adapter.d_initial,
            "vera_dropout": adapter.dropout,
            "projection_prng_key": adapter.projection_prng_key,
            "save_projection": True,
            "init_weights": True,
        }
    if isinstance(adapter, AdaLoRA):
        return {
            "peft_type": "ADALORA",
            "init_r": adapter.init_r,
            "target_r": adapter.target_r,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
            "init_lora_weights": True,
        } | adalora_format.SCHEDULE_FIELDS
    if isinstance(adapter, AFLoRA):
        return {
            "peft_type": AFLORA,
            "r": adapter.r,
            "d_initial": adapter.d_initial,
            "lora_dropout": adapter.dropout,
        }
    return _config_from_lora(adapter)


def _config_from_lora(adapter: Any) -> dict[str, Any]:
    config = {
        "peft_type": "LORA",
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "init_lora_weights": True,
    }
    if isinstance(adapter, LaMDA):
        # svd_niter has no meaning for an init that leaves the weight unchanged.
        return config | {
            "peft_type": LAMDA,
            "use_lamda": True,
            "lamda_init": "zero" if adapter.residual else adapter.init,
            "svd_niter": adapter.svd_niter,
        }
    config |= {"lora_bias": adapter.lora_bias, "use_dora": isinstance(adapter, DoRA)}
    if adapter.init == "gaussian":
        config["init_lora_weights"] = "gaussian"
    if adapter.axis == "in":
        config["peft_type"] = DORA_IN
    return config

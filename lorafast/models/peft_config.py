"""PEFT's configs in our words and ours in PEFT's: the dict that adapter_config.json holds. Nothing of PEFT is imported."""

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
from lorafast.models import adalora_format
from lorafast.models.adapt_spec import Plan

# Fields that say nothing about what a layer computes: who wrote the file and for what, or how weights lie.
_IDLE = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_weights", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "save_projection", "task_type", "use_lamda",
)  # fmt: skip
# Starts that leave the weight alone, so that their files need nothing of ours; and what configures a start.
_STARTED_ELSEWHERE = ("eva", "orthogonal")
_START_CONFIGS = ("eva_config", "lora_ga_config")
# What PEFT makes trainable and saves where a config names a task and no modules_to_save.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_PLAN = (
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "layers_to_transform",
    "layers_pattern",
)  # fmt: skip
# What PEFT does not have goes under a type it refuses, rather than being read as something else.
LAMDA, DORA_IN, AFLORA = "LAMDA", "LORAFAST_DORA_IN", "LORAFAST_AFLORA"


def is_one(adapter: object) -> bool:
    """Whether this is a config of PEFT's."""
    return hasattr(adapter, "peft_type") and callable(getattr(adapter, "to_dict", None))


def asked(config: Any, model: nn.Module) -> dict[str, Any]:
    """The config as a dict, with what PEFT fills in by the model: default targets, and heads of a task."""
    said = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    if said.get("use_lamda"):
        said["peft_type"] = LAMDA
    if said.get("target_modules") is None:
        from peft.utils import constants

        tables = {kind: kind for kind in ("VERA", "LORA", "ADALORA")}
        table = getattr(
            constants,
            f"TRANSFORMERS_MODELS_TO_{tables.get(said['peft_type'], 'LORA')}_TARGET_MODULES_MAPPING",
        )
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in table:
            raise ValueError(
                f"target_modules is None, and PEFT has no default for a model of type {kind!r}: name them"
            )
        said["target_modules"] = table[kind]
    if not said.get("modules_to_save"):
        said["modules_to_save"] = [
            head for head in _HEADS.get(said.get("task_type"), ()) if hasattr(model, head)
        ]
    return said


def plan_of(config: dict[str, Any], loading: bool = False) -> Plan:
    """The plan a config asks for. loading: values come from a file, and a start matters only if it changes the weight.

    Raises ValueError or TypeError naming the field: one of another type, one unknown that says something, or one that is not ours.
    """
    kind = config.get("peft_type")
    readers: dict[str, Callable] = {
        "LORA": _lora, "VERA": _vera, "ADALORA": _adalora, LAMDA: _lamda, DORA_IN: _dora_in, AFLORA: _aflora,
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in readers:
        raise ValueError(f"peft_type={kind!r} must be one of {', '.join(map(repr, readers))}")
    left = {key: value for key, value in config.items() if key not in _IDLE}
    adapter = readers[kind](_Fields(left), loading)
    if isinstance(adapter, AdaLoRA) and left.get("rank_pattern"):
        left["rank_pattern"] = adalora_format.ranks(left["rank_pattern"], adapter.init_r)
    said = {key: left.pop(key) for key in _PLAN if left.get(key) is not None}
    said |= {key: [said[key]] for key in ("layers_to_transform",) if isinstance(said.get(key), int)}
    said |= {key: [said[key]] for key in ("layers_pattern",) if isinstance(said.get(key), str)}
    if said.get("bias") == "vera_only":
        said["bias"] = "lora_only"
    rest = sorted(
        key
        for key, value in left.items()
        if value and key not in _PLAN and not (loading and key in _START_CONFIGS)
    )
    if rest:
        raise ValueError(
            f"{', '.join(f'{key}={left[key]!r}' for key in rest)}: lorafast has no such thing"
        )
    if not isinstance(config.get("task_type"), str | None):
        raise TypeError(f"task_type={config['task_type']!r} must be a word")
    if isinstance(said.get("target_modules"), set):
        said["target_modules"] = sorted(said["target_modules"])
    return Plan(
        adapter,
        **said,
        task_type=config.get("task_type"),
        forgiving=True,
        loose=True,
        foreign=loading,
        untie=True,
    )


class _Fields:
    """A config's fields, each to be taken once, with its type checked."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def take(self, name: str, default: Any, *kinds: type) -> Any:
        value = self._fields.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(
                f"{name}={value!r} must be {' or '.join(kind.__name__ for kind in kinds)}"
            )
        return value


def _scaled(f: _Fields) -> dict[str, Any]:
    return {
        "r": f.take("r", 8, int),
        "alpha": f.take("lora_alpha", 8, int, float),
        "dropout": f.take("lora_dropout", 0.0, int, float),
        "rslora": f.take("use_rslora", False, bool),
    }


def _lora(f: _Fields, loading: bool) -> Adapter:
    said = _scaled(f) | {"lora_bias": f.take("lora_bias", False, bool)}
    said["init"] = _init(f.take("init_lora_weights", True, bool, str), loading)
    if not f.take("use_dora", False, bool):
        return LoRA(**said)
    return DoRA(**said, dropout_on="both" if said["dropout"] else "adapter")


def _init(init: bool | str, loading: bool) -> str | PiSSA:
    if init is True or (loading and (init is False or init in _STARTED_ELSEWHERE)):
        return "kaiming"
    if init == "gaussian":
        return init
    if init == "pissa":
        return PiSSA(0)
    if isinstance(init, str) and (niter := re.fullmatch(r"pissa_niter_([0-9]{1,4})", init)):
        if loading:
            raise ValueError(
                f"init_lora_weights={init!r}: what PEFT took out of the weights was drawn at random and is not in the file; "
                "save it from PEFT with path_initial_model_for_weight_conversion"
            )
        return PiSSA(int(niter[1]))
    if init == "lora_ga":
        absent = "what PEFT took out of the weights is not in the file; save it with path_initial_model_for_weight_conversion"
        given = "no config holds gradients; adapt with lorafast.LoRA(init=lorafast.LoRAGA(gradients, compat='peft'))"
        raise ValueError(f"init_lora_weights='lora_ga': {absent if loading else given}")
    raise ValueError(
        f"init_lora_weights={init!r} is not lorafast's: start the model in PEFT, and lorafast.accelerate it"
    )


def _dora_in(f: _Fields, loading: bool) -> Adapter:
    said = _scaled(f) | {"lora_bias": f.take("lora_bias", False, bool)}
    f.take("use_dora", True, bool)
    return DoRA(
        **said, init=_init(f.take("init_lora_weights", True, bool, str), loading), axis="in"
    )


def _lamda(f: _Fields, loading: bool) -> Adapter:
    f.take("init_lora_weights", True, bool, str)
    return LaMDA(
        **_scaled(f),
        init=f.take("lamda_init", "residual", str),
        svd_niter=f.take("svd_niter", None, int),
    )


def _vera(f: _Fields, loading: bool) -> Adapter:
    return VeRA(
        r=f.take("r", 256, int), d_initial=f.take("d_initial", 0.1, int, float), dropout=f.take("vera_dropout", 0.0, int, float),
        projection_prng_key=f.take("projection_prng_key", 0, int),
    )  # fmt: skip


def _adalora(f: _Fields, loading: bool) -> Adapter:
    init = f.take("init_lora_weights", True, bool, str)
    f.take("r", 8, int)  # LoraConfig's, which means nothing here
    for name, value in adalora_format.SCHEDULE_FIELDS.items():
        f.take(name, value, int, float)
    r, target_r = f.take("init_r", 12, int), f.take("target_r", 8, int)
    if loading:
        # PEFT looks at none of these where it makes or loads such a layer, so that no file's values depend on them.
        for name in ("use_rslora", "alpha_pattern"):
            f.take(name, None, bool, dict)
        target_r = min(target_r, r)
    elif init is not True:
        raise ValueError(
            f"init_lora_weights={init!r}: AdaLoRA has one start, A and B normal and E at 0; say True"
        )
    return AdaLoRA(
        r=r, target_r=target_r, alpha=f.take("lora_alpha", 8, int, float), dropout=f.take("lora_dropout", 0.0, int, float)
    )  # fmt: skip


def _aflora(f: _Fields, loading: bool) -> Adapter:
    return AFLoRA(
        r=f.take("r", 4, int),
        d_initial=f.take("d_initial", 1.0, int, float),
        dropout=f.take("lora_dropout", 0.0, int, float),
    )


def dict_of(adapter: Adapter) -> dict[str, Any]:
    """What a config says of an adapter. Its start is written as one that leaves the weight alone: see checkpoint."""
    if isinstance(adapter, VeRA):
        return {
            "peft_type": "VERA", "r": adapter.r, "d_initial": adapter.d_initial, "vera_dropout": adapter.dropout,
            "projection_prng_key": adapter.projection_prng_key, "save_projection": True, "init_weights": True,
        }  # fmt: skip
    if isinstance(adapter, AdaLoRA):
        return {
            "peft_type": "ADALORA", "init_r": adapter.init_r, "target_r": adapter.target_r, "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout, "init_lora_weights": True,
        } | adalora_format.SCHEDULE_FIELDS  # fmt: skip
    if isinstance(adapter, AFLoRA):
        return {
            "peft_type": AFLORA,
            "r": adapter.r,
            "d_initial": adapter.d_initial,
            "lora_dropout": adapter.dropout,
        }
    said = {
        "peft_type": "LORA", "r": adapter.r, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora, "init_lora_weights": True,
    }  # fmt: skip
    if isinstance(adapter, LaMDA):
        # The number of iterations says nothing about a start that leaves the weight alone.
        init = "zero" if adapter.residual else adapter.init
        return said | {
            "peft_type": LAMDA,
            "use_lamda": True,
            "lamda_init": init,
            "svd_niter": adapter.svd_niter,
        }
    said |= {"lora_bias": adapter.lora_bias, "use_dora": isinstance(adapter, DoRA)}
    if adapter.init == "gaussian":
        said["init_lora_weights"] = "gaussian"
    return said | ({"peft_type": DORA_IN} if adapter.axis == "in" else {})

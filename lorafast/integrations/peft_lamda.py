"""LaMDA (arXiv:2406.12832) inside PEFT: a LoraConfig for LoRA with a trained core and a frozen A.

PEFT does everything except the layers, which are lorafast's from the start, and the description of
the method in adapter_config.json. lorafast.load_adapter reads the files that PEFT saves, and files
of lorafast.save_adapter can be loaded here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

from torch import nn

from lorafast.engine import checks
from lorafast.integrations import peft_lamda_variant, peft_support
from lorafast.integrations.peft_linear import Linear
from lorafast.methods.lamda import INITS, LaMDA
from lorafast.models.peft_config import LAMDA, OLD_LAMDA
from lorafast.runtime import extras

with extras.required("peft"):
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

# Fields that LaMDA has no meaning for. PEFT marks the fields of its variants in their metadata;
# these are no variants, or not marked in every version.
_REFUSED_FIELDS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
)


@dataclass
class LamdaConfig(LoraConfig):
    """PEFT's LoraConfig for LaMDA: every targeted nn.Linear and Conv1D gets a trained core.

    y = x Wᵀ + s·((drop(x) Aᵀ) Sᵀ) Bᵀ + bias; S (lora_core [R,R]) and B train, A is frozen. Rank,
    alpha, rslora, dropout, patterns and bias are LoraConfig's. lorafast.schedule.LaMDAFreeze
    freezes the columns of B.

    With lamda_init="residual" the base weight changes, as with PEFT's PiSSA: a disabled, deleted or
    unloaded adapter leaves the residual behind, and a saved one belongs to the original weights. An
    adapter beside others on one layer adds up with them in plain torch; on a layer that PEFT made
    for a LoRA it needs lorafast.accelerate first. PEFT's add_weighted_adapter reads no core: use
    combination_type="svd".

    Args:
        lamda_init: "residual", "zero" or "repo", as init of lorafast.LaMDA.
        svd_niter: subspace iterations of the init's SVD, 0 for an exact one; None chooses, as in
            lorafast.LaMDA.

    Raises:
        ValueError: a field that LaMDA has no meaning for is set, or a value is wrong.
        TypeError: when the model is made, a target is no plain nn.Linear or Conv1D.

    Example:
        import peft, tempfile, torch
        from lorafast.integrations.peft_lamda import LamdaConfig

        def base():
            return torch.nn.Sequential(torch.nn.Linear(8, 8))

        config = LamdaConfig(r=2, lora_alpha=4, target_modules=["0"], lamda_init="zero")
        model = peft.get_peft_model(base(), config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = peft.PeftModel.from_pretrained(base(), folder)

    Source:
        arXiv:2406.12832
    """

    lamda_init: str = field(
        default="residual", metadata={"help": "Init: residual, zero or repo, as in lorafast.LaMDA"}
    )
    svd_niter: int | None = field(
        default=None,
        metadata={"help": "Subspace iterations of the init's SVD, 0 for an exact one"},
    )

    def __post_init__(self) -> None:
        self._check_fields()
        super().__post_init__()
        self.init_lora_weights = peft_lamda_variant.encode(self.lamda_init, self.svd_niter)
        self._register_custom_module({nn.Module: build})

    def to_dict(self) -> dict:
        """Return the content of adapter_config.json.

        Its peft_type is one that PEFT refuses unless lorafast is imported (peft_registry); it would
        read the file as a LoRA without core.
        """
        if self.init_lora_weights != peft_lamda_variant.encode(self.lamda_init, self.svd_niter):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} has been set since: a LaMDA is "
                "saved as it is, and PEFT's path_initial_model_for_weight_conversion cannot make a "
                "LoRA of it"
            )
        return super().to_dict() | {"peft_type": LAMDA, "init_lora_weights": True}

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> LamdaConfig:
        """Return the config that to_dict wrote; PEFT's from_pretrained calls it.

        ValueError if the file is of another method.
        """
        if (peft_type := kwargs.pop("peft_type", LAMDA)) not in (LAMDA, OLD_LAMDA):
            raise ValueError(
                f"peft_type={peft_type!r} is no LaMDA: peft.PeftConfig.from_pretrained reads it"
            )
        kwargs.pop("use_lamda", None)  # save_adapter writes it; it is implied by the class
        known = {field.name for field in fields(cls)}
        if unknown := sorted(kwargs.keys() - known):
            warnings.warn(
                f"LamdaConfig: this PEFT knows no {', '.join(unknown)}, which the file sets",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    def _check_fields(self) -> None:
        checks.word("lamda_init", self.lamda_init, INITS)
        LaMDA(
            self.r,
            self.lora_alpha,
            rslora=self.use_rslora,
            init=self.lamda_init,
            svd_niter=self.svd_niter,
        )
        variants = [field.name for field in fields(self) if field.metadata.get("is_lora_variant")]
        refused = dict.fromkeys((*_REFUSED_FIELDS, *variants))
        if given := [name for name in refused if getattr(self, name, None)]:
            raise ValueError(f"LamdaConfig: LaMDA has no {', '.join(given)}")
        if peft_lamda_variant.decode(self.init_lora_weights):
            raise ValueError(
                "LamdaConfig: make a new one instead of dataclasses.replace, with which PEFT's "
                "add_weighted_adapter would mix A and B without their core"
            )
        if self.init_lora_weights is not True:
            raise ValueError(
                f"LamdaConfig: init_lora_weights={self.init_lora_weights!r} is LoRA's; LaMDA "
                "starts by lamda_init"
            )


def build(target: nn.Module, adapter_name: str, **settings: object) -> Linear:
    """Return the layer that PEFT puts in place of a target.

    TypeError unless the target is a plain nn.Linear or Conv1D of a floating dtype.
    """
    is_conv1d = type(target) is Conv1D
    if not (is_conv1d or type(target) is nn.Linear):
        raise _unsupported(settings, peft_support.type_name(target))
    weight = target.weight
    if type(weight) is not nn.Parameter or weight.dtype not in checks.DTYPES:
        kinds = f"{peft_support.type_name(target)} with a {peft_support.type_name(weight)}"
        raise _unsupported(settings, f"{kinds} of {weight.dtype}")
    # Read from the layer, because one config may target both types. Older versions of PEFT pass the
    # field instead of the config.
    if "config" in settings:
        settings["config"].fan_in_fan_out = is_conv1d
    else:
        settings["fan_in_fan_out"] = is_conv1d
    return Linear(target, adapter_name, is_target_conv_1d_layer=is_conv1d, **settings)


def _unsupported(settings: dict[str, object], kind: str) -> TypeError:
    name = settings.get("target_name") or "one of them"
    return TypeError(
        f"target_modules: LaMDA adapts plain nn.Linear and Conv1D layers, and {name} is a {kind}: "
        "PEFT has no LaMDA for it"
    )

"""LaMDA (arXiv 2406.12832) inside PEFT: a LoraConfig that makes layers with a trained r×r core between a frozen A and B.

    model = peft.get_peft_model(model, LamdaConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(path)
    model = peft.PeftModel.from_pretrained(base, path, config=LamdaConfig.from_pretrained(path))

PEFT does everything but the layers, which are lorafast's from the start, and what its config says on disk. lorafast.load_adapter
reads the same files, and save_adapter's can be read here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafast.engine import checks
from lorafast.integrations import peft_lamda_variant, peft_support
from lorafast.integrations.peft_linear import Linear
from lorafast.methods.lamda import INITS, LaMDA
from lorafast.models.peft_config import LAMDA

# What PEFT's own variants are switched on by is found in its config; these are not among them, or not in every PEFT.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
)


@dataclass
class LamdaConfig(LoraConfig):
    """y = x Wᵀ + s·((drop(x) Aᵀ) Sᵀ) Bᵀ + bias on every targeted nn.Linear and Conv1D; S (lora_core [r,r]) and B train, A does not.

    lamda_init, svd_niter: init and svd_niter of lorafast.LaMDA. "residual" changes the base weight, as PEFT's PiSSA does: a
    disabled, deleted or unloaded adapter leaves the residual behind, and a saved one belongs to the original weights.
    Rank, alpha, rslora, dropout, patterns and bias are LoraConfig's. An adapter beside others adds up with them in plain torch; on
    a layer that PEFT made for a LoRA it needs lorafast.accelerate first. PEFT's add_weighted_adapter reads no core: mix with "svd".
    ValueError for what LaMDA has no meaning for; TypeError, when the model is made, for a target that is no plain linear.
    """

    lamda_init: str = field(
        default="residual", metadata={"help": "Start: residual, zero or repo, as in lorafast.LaMDA"}
    )
    svd_niter: int | None = field(
        default=None,
        metadata={"help": "Subspace iterations of the start's SVD, 0 for an exact one"},
    )

    def __post_init__(self) -> None:
        self._refuse_what_is_not_lamda()
        super().__post_init__()
        self.init_lora_weights = peft_lamda_variant.word(self.lamda_init, self.svd_niter)
        self._register_custom_module({nn.Module: build})

    def to_dict(self) -> dict:
        """What adapter_config.json holds. Its peft_type makes a PEFT alone refuse what it would read as a LoRA without a core."""
        if self.init_lora_weights != peft_lamda_variant.word(self.lamda_init, self.svd_niter):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} has been set since: a LaMDA is saved as it is, and PEFT's "
                "path_initial_model_for_weight_conversion cannot make a LoRA of it"
            )
        return super().to_dict() | {"peft_type": LAMDA, "init_lora_weights": True}

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> LamdaConfig:
        """The config of what to_dict wrote; from_pretrained ends here. ValueError if it is some other PEFT method's."""
        if (kind := kwargs.pop("peft_type", LAMDA)) != LAMDA:
            raise ValueError(
                f"peft_type={kind!r} is no LaMDA: peft.PeftConfig.from_pretrained reads it"
            )
        kwargs.pop("use_lamda", None)  # save_adapter's, and no news
        known = {one.name for one in fields(cls)}
        if unknown := sorted(kwargs.keys() - known):
            warnings.warn(
                f"LamdaConfig: this PEFT knows no {', '.join(unknown)}, which the file sets",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in kwargs.items() if name in known})

    def _refuse_what_is_not_lamda(self) -> None:
        checks.word("lamda_init", self.lamda_init, INITS)
        LaMDA(
            self.r,
            self.lora_alpha,
            rslora=self.use_rslora,
            init=self.lamda_init,
            svd_niter=self.svd_niter,
        )
        variants = [one.name for one in fields(self) if one.metadata.get("is_lora_variant")]
        if given := [
            name for name in dict.fromkeys((*_REFUSED, *variants)) if getattr(self, name, None)
        ]:
            raise ValueError(f"LamdaConfig: LaMDA has no {', '.join(given)}")
        if peft_lamda_variant.read(self.init_lora_weights):
            raise ValueError(
                "LamdaConfig: make a new one instead of dataclasses.replace, with which PEFT's add_weighted_adapter would mix A "
                "and B without their core"
            )
        if self.init_lora_weights is not True:
            raise ValueError(
                f"LamdaConfig: init_lora_weights={self.init_lora_weights!r} is LoRA's; LaMDA starts by lamda_init"
            )


def build(target: nn.Module, adapter_name: str, **settings: object) -> Linear:
    """The layer PEFT puts in the place of a target. TypeError unless that is a plain nn.Linear or Conv1D of floating dtype."""
    conv = type(target) is Conv1D
    if not (conv or type(target) is nn.Linear):
        raise TypeError(_no_place(settings, peft_support.kind(target)))
    weight = target.weight
    if type(weight) is not nn.Parameter or weight.dtype not in checks.DTYPES:
        raise TypeError(
            _no_place(
                settings,
                f"{peft_support.kind(target)} with a {peft_support.kind(weight)} of {weight.dtype}",
            )
        )
    # Read off the layer, because one config may target both sorts; older PEFTs hand the field itself over.
    if "config" in settings:
        settings["config"].fan_in_fan_out = conv
    else:
        settings["fan_in_fan_out"] = conv
    return Linear(target, adapter_name, is_target_conv_1d_layer=conv, **settings)


def _no_place(settings: dict[str, object], what: str) -> str:
    name = settings.get("target_name") or "one of them"
    return f"target_modules: LaMDA adapts plain nn.Linear and Conv1D layers, and {name} is a {what}: PEFT has no LaMDA for it"

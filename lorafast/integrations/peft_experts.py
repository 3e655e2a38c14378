"""PEFT's lora.ParamWrapper on transformers' experts, on lorafast's grouped op.

PEFT writes W + s·BA of all experts anew in every call. Here the projections are computed from W and
from views of PEFT's own factors; Parameters, names and the state dict stay PEFT's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.grouped.call import grouped_linear_checked
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.integrations import peft_support
from lorafast.models import expert_targets, experts_forward
from lorafast.models.explain import LayerCall
from lorafast.runtime import extras, torch_internals

with extras.required("peft"):
    from peft.tuners.lora import layer as peft_layer

# A PEFT without wrappers of Parameters has nothing to serve.
PeftParamWrapper: Any = getattr(peft_layer, "ParamWrapper", None)
_Base: Any = PeftParamWrapper or nn.Module


# The classes of experts whose forward goes by transformers' registry.
_served: set[type] = set()


class ParamWrapper(_Base):
    """PEFT's lora.ParamWrapper, whose experts run on lorafast's ops.

    Several wrappers around one module of experts, one in the other, are served together by the
    outermost. A call that the ops cannot serve runs PEFT's own forward.

    Example:
        import peft, lorafast

        config = peft.LoraConfig(
            target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        )
        # model = peft.get_peft_model(mixture_of_experts, config)
        # lorafast.accelerate(model)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _remember(self)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the output of the module of experts."""
        chain = chain_of(self)
        if why := why_not_call(chain, x, args, kwargs):
            return peft_forward(self, why, x, *args, **kwargs)
        projections = {wrapper.parameter_name: wrapper for wrapper in chain.wrappers}

        def projection(name: str) -> experts_forward.Projection:
            if name not in projections:
                return experts_forward.frozen_projection(chain.experts, name)
            tensors, options = _call_of(projections[name])
            return lambda x, groups: _adapted(x, groups, tensors, options)

        return experts_forward.run(chain.experts, x, *args, projection)

    def lorafast_calls(self, tokens: int = 0) -> list[LayerCall]:
        """Return the calls that lorafast.explain describes: the active adapters', else all."""
        names = peft_support.active_adapters(self) or list(self.lora_A)
        if _why_not_adapters(self, names[:1]):
            return []
        return [_explained_call(self, name) for name in names]


class Chain(NamedTuple):
    """A wrapper, those that it contains, and the module of experts in them."""

    wrappers: tuple[Any, ...]
    experts: Any


def chain_of(layer: Any) -> Chain:
    """Return the chain that begins at a wrapper."""
    wrappers: list[Any] = []
    while is_wrapper(layer):
        wrappers.append(layer)
        layer = layer._modules["base_layer"]
    return Chain(tuple(wrappers), layer)


def peft_forward(
    layer: ParamWrapper, why: str, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Return the output of PEFT's own forward. why: the reason, for those who count calls."""
    return PeftParamWrapper.forward(layer, x, *args, **kwargs)


def _adapted(
    x: torch.Tensor, groups: Groups, tensors: LayerTensors, options: CallOptions
) -> torch.Tensor:
    return grouped_linear_checked(x, groups, tensors, options)


def _call_of(layer: Any, name: str | None = None) -> tuple[LayerTensors, CallOptions]:
    """Return the arguments of an adapter's calls, of the active one's without a name.

    PEFT packs A as [E·R,K], the expert slowest, and B as [N,R·E], the expert fastest: both are
    views.
    """
    name = name or peft_support.active_adapters(layer)[0]
    experts, key, E = layer.get_base_layer(), layer.parameter_name, layer.num_experts
    weight = getattr(experts, key)
    weight = weight.transpose(1, 2) if experts_forward.is_transposed(experts) else weight
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    tensors = LayerTensors(
        weight,
        experts_forward.bias_of(experts, key),
        A.view(E, -1, A.shape[1]),
        B.view(B.shape[0], -1, E).permute(2, 0, 1),
    )
    return tensors, CallOptions(layer.scaling[name], keep="auto")


def why_not_call(chain: Chain, x: torch.Tensor, args: tuple, kwargs: dict) -> str | None:
    """Return why the ops cannot serve a call, or None."""
    if "parametrizations" in chain.experts._modules:
        return "its experts' weights are parametrized, by an outer wrapper of PEFT's for example"
    if len(args) != 2 or kwargs:
        return "is called with other arguments than tokens, experts and weights"
    for wrapper in chain.wrappers:
        if why := why_not_state(wrapper):
            return why
    for inner in chain.wrappers[1:]:
        if why := peft_support.why_not_skippable(inner):
            return f"an inner wrapper {why}"
    return _why_not_input(chain.experts, x)


def why_not_state(layer: Any) -> str | None:
    """Return why the ops cannot serve a wrapper in its present state, or None."""
    if why := peft_support.why_not_active(layer):
        return why
    return _why_not_adapters(layer, peft_support.active_adapters(layer))


def why_not_layer(layer: Any) -> str | None:
    """Return why the ops cannot serve a wrapper in any state, or None."""
    if "forward" in vars(layer):
        return "has a forward of its own, which somebody else put there"
    return _why_not_adapters(layer, peft_support.active_adapters(layer) or list(layer.lora_A))


def _why_not_adapters(layer: Any, names: list[str]) -> str | None:
    experts, key = layer.get_base_layer(), layer.parameter_name
    weight = experts._parameters.get(key)
    if weight is None:
        return f"its {key} is no Parameter of a {peft_support.type_name(experts)}"
    # The walk through the class and the tensor is no matter of a call, nor of a compiler.
    plain = type(experts) in _served and not experts._is_expert_parallel
    usual = type(weight) is nn.Parameter and weight.dtype in checks.DTYPES and weight.dim() == 3
    if not (plain and usual) and (why := expert_targets.why_not_parameter(experts, key)):
        return f"its Parameter {key} {why}"
    if why := peft_support.why_not_skippable(experts):
        return f"its module of experts {why}"
    if weight.requires_grad:
        return f"its Parameter {key} trains"
    if len(names) != 1:
        return "several active adapters on one Parameter of experts"
    if layer.num_experts < 2:
        return "one expert, whose factors PEFT reads as those of a linear"
    (name,) = names
    return _why_not_adapter(layer, name, weight)


def _why_not_adapter(layer: Any, name: str, weight: torch.Tensor) -> str | None:
    A, B, dropout = peft_support.adapter_modules(layer, name)
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
        return "its lora_A and lora_B are no plain linears"
    if B.bias is not None or name in layer.lora_variant or peft_support.can_drop(dropout):
        return "its adapter has a bias, a variant or a dropout, which PEFT's experts have not"
    if layer._did_swap_in_out_features == experts_forward.is_transposed(layer.get_base_layer()):
        return "PEFT has read the order of its dimensions otherwise"
    for module in (A, B):
        if why := peft_support.why_not_skippable(module):
            return f"a part of its adapter {why}"
    return peft_support.why_not_tensors(
        [A.weight, B.weight], weight
    ) or peft_support.why_not_scaling(layer.scaling[name], weight)


def _why_not_input(experts: Any, x: torch.Tensor) -> str | None:
    weight = getattr(experts, experts_forward.up_name(experts))
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.layout is not torch.strided:
        return "x is no matrix of tokens"
    if x.dtype not in checks.DTYPES or x.device != weight.device:
        return "x does not fit its experts"
    if torch_internals.transforms_active():
        return "torch.func or forward-mode AD is at work"
    return None


def _explained_call(layer: Any, name: str) -> LayerCall:
    why = why_not_state(layer)
    tensors, options = _call_of(layer, name)
    return LayerCall(
        f"LoRA of PEFT ({name})",
        tensors,
        options._replace(scaling=2.0),
        merged=layer.merged,
        bypass=why and f"PEFT's own forward: {why}",
    )


def is_wrapper(layer: nn.Module) -> bool:
    """Return True for PEFT's ParamWrapper, or ours."""
    return PeftParamWrapper is not None and type(layer) in (PeftParamWrapper, ParamWrapper)


def convert(layer: Any) -> None:
    """Change a wrapper of PEFT's to the class here."""
    layer.__class__ = ParamWrapper
    _remember(layer)


def _remember(layer: Any) -> None:
    """Keep that the forward of a wrapper's experts goes by transformers' registry."""
    experts = layer.get_base_layer()
    if experts_forward.why_not_experts(experts) is None:
        _served.add(type(experts))


def restore(model: nn.Module) -> int:
    """Undo convert for all wrappers of a model, and return how many are PEFT's again."""
    layers = [module for module in model.modules() if type(module) is ParamWrapper]
    for layer in layers:
        layer.__class__ = PeftParamWrapper
    return len(layers)

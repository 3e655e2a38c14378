"""Which way a call of a PEFT layer is expected to be quicker on a GPU: the ops, or PEFT's forward.

The model of engine.step_model says so of a training step, whatever is recorded of a call: a forward
that is recomputed goes the way of the first one. It knows bf16 and fp16 outside autocast. Elsewhere
only a dropout mask made by torch's operations is known to cost more than PEFT's forward.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn

from lorafast.engine import masks, step_model
from lorafast.engine.formula import resolve_keep
from lorafast.engine.kernels.modelled import Machine
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.engine.step_model import Part
from lorafast.runtime import devices, env, extras, torch_internals

with extras.required("peft"):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear as PeftLinear

# The reason where the ops would make the dropout bits by torch's operations on a GPU.
SLOW_DROPOUT = "dropout without a kernel for its mask, for which PEFT's forward is quicker on a GPU"
# By what decides them; "" for the ops. What may be answered otherwise the next time is not kept.
_answers: dict[tuple, str] = {}
_recent: dict[tuple, str] = {}
_MOST_ANSWERS = 4096


def why_peft(M: int, dtype: torch.dtype, tensors: LayerTensors, options: CallOptions) -> str | None:
    """Return why PEFT's forward is expected to be quicker for a call of M tokens, or None.

    The first question about a GPU runs its trial. LaMDA is no adapter of PEFT's own.

    dtype: of x. options: those of the call; keep may be "auto".
    """
    weight = tensors.weight
    device = weight.device
    if tensors.core is not None or devices.of(device).vendor in ("cpu", "meta"):
        return None
    if (
        dtype in step_model.HALVES
        and weight.dtype is dtype
        and not torch_internals.any_autocast()
        # One of selective checkpointing is active in both of its passes, which must go one way.
        and not torch_internals.dispatch_modes_active()
    ):
        answer = _remembered(M, tensors, options)
        if answer is not None:
            return answer or None
    return why_slow_mask(dtype, tensors, options)


def why_slow_mask(dtype: torch.dtype, tensors: LayerTensors, options: CallOptions) -> str | None:
    """Return SLOW_DROPOUT if a call drops by torch's operations and PEFT's costs less, else None.

    With fp32 factors DoRA costs PEFT far more than the mask costs the ops.
    """
    half = tensors.lora_A.dtype.itemsize == 2
    if not options.dropout or not (tensors.magnitude is None or half):
        return None
    return SLOW_DROPOUT if masks.made_by_torch(tensors.weight.device, dtype) else None


def _remembered(M: int, tensors: LayerTensors, options: CallOptions) -> str | None:
    """The answer of the model: a reason, "" for the ops, None where it says nothing.

    That of the same tensors is found sooner, at every call of a layer. Another tensor at an address
    may get the answer of one that is gone: both ways compute the same.
    """
    key = (M, id(tensors.weight), id(tensors.lora_A), options.dropout, env.raw_get(env.BACKEND_KEY))
    answer = _recent.get(key)
    if answer is None:
        answer, lasts = _modelled(M, tensors, options)
        if lasts and answer is not None:
            _keep(_recent, key, answer)
    return answer


def _modelled(M: int, tensors: LayerTensors, options: CallOptions) -> tuple[str | None, bool]:
    """The answer, and True if it lasts."""
    weight, bias, A, B, *_ = tensors
    # Of calls of many lengths few are modelled.
    M = 1 << max(0, M - 1).bit_length()
    key = (
        M, weight.device, weight.dtype, weight.shape, weight.stride(), A.shape[0], A.dtype, B.dtype,
        bias is None, tensors.lora_bias is None, tensors.magnitude is None,
        A.requires_grad, B.requires_grad, options[1:5],
        env.raw_get(env.BACKEND_KEY),
    )  # fmt: skip
    known = _answers.get(key)
    if known is not None:
        return known, True
    answer, lasts = _compare(M, tensors, options)
    if lasts and answer is not None:
        _keep(_answers, key, answer)
    return answer, lasts


def _keep(answers: dict[tuple, str], key: tuple, answer: str) -> None:
    if len(answers) >= _MOST_ANSWERS:
        answers.clear()
    answers[key] = answer


def _compare(M: int, tensors: LayerTensors, options: CallOptions) -> tuple[str | None, bool]:
    """The answer, and True if it lasts."""
    needs = _needs(tensors)
    has_bias = tensors.bias is not None or tensors.lora_bias is not None
    keep = resolve_keep(options.keep, options, needs.gain, has_bias, tensors.weight.dtype)
    found = step_model.modelled_step(M, tensors, options._replace(keep=keep), needs)
    if found is None:
        return None, True
    layer, machine, ours, lasts = found
    frozen = step_model.frozen(layer.M, layer.weight, tensors.bias is not None, machine)
    try:
        theirs = peft_seconds(Setting.of(layer.M, tensors, options), machine)
    except Exception:
        # A PEFT that cannot be built or run so says nothing; the call itself goes on.
        return None, True
    if ours <= theirs:
        return "", lasts
    by_frozen = f"{theirs / frozen:.2f} × the frozen layer, {ours / frozen:.2f} by the ops"
    return f"PEFT's forward is quicker in a model of {M} tokens: {by_frozen}", lasts


def _needs(tensors: LayerTensors) -> GradMask:
    """The gradients that a training step needs."""
    trained = {
        name: tensor.requires_grad
        for name, tensor in tensors._asdict().items()
        if tensor is not None and name in GradMask._fields
    }
    return GradMask(**(trained | {"x": True, "norm": False}))


class Setting(NamedTuple):
    """A PEFT layer and its call. trains: for A and for B if they do."""

    M: int
    weight: Part
    R: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]
    biases: tuple[bool, bool]
    trains: tuple[bool, bool]
    p: float

    @staticmethod
    def of(M: int, tensors: LayerTensors, options: CallOptions) -> Setting:
        """The setting of a call."""
        A, B, magnitude = tensors.lora_A, tensors.lora_B, tensors.magnitude
        return Setting(
            M,
            Part.of(tensors.weight),
            A.shape[0],
            (A.dtype, B.dtype, None if magnitude is None else magnitude.dtype),
            (tensors.bias is not None, tensors.lora_bias is not None),
            (A.requires_grad, B.requires_grad),
            options.dropout,
        )


@functools.lru_cache(maxsize=1024)
def peft_seconds(setting: Setting, machine: Machine) -> float:
    """Return the modelled seconds of a training step by PEFT's own forward."""
    M, weight, R, (of_A, of_B, of_magnitude), (bias, lora_bias), (trains_A, trains_B), p = setting
    N, K = weight.shape
    config = LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=p, use_dora=of_magnitude is not None,
        lora_bias=lora_bias, target_modules=["0"],
    )  # fmt: skip
    # PEFT initialises factors on the CPU: the user's stream of random numbers stays what it is.
    cpu = torch.device("cpu")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), cpu:
        base = nn.Sequential(nn.Linear(K, N, bias, "meta", weight.dtype))
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].train()
    (A,), (B,) = layer.lora_A.values(), layer.lora_B.values()
    A.to(of_A).requires_grad_(trains_A)
    B.to(of_B).requires_grad_(trains_B)
    for magnitude in layer.lora_magnitude_vector.values():
        magnitude.to(of_magnitude)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    # By name: accelerate and patch_peft may have put another forward in its place.
    forward = functools.partial(PeftLinear.forward, layer)
    return step_model.of_call(forward, trained, M, weight, machine)

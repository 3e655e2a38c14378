"""LoRA-Pro (arXiv:2407.18242): steps of A and B that approximate a step of the full weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.adamw import adamw

from lorafast.engine import checks
from lorafast.engine.precision import accumulator
from lorafast.engine.problem import Scaling
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.optim.factors import (
    FACTORS,
    AdapterParameter,
    check_two_factors,
    find_adapter_parameters,
    parameter_groups,
)
from lorafast.optim.lora_pro_steps import (
    X_CHOICES,
    FactorPair,
    decompose_pairs,
    equivalent_gradient,
    factor_gradients,
    solve_steps,
)

VARIANTS = ("adamw", "sgd")
DECAYS = ("factors", "delta")


class LoRAPro(torch.optim.Optimizer):
    """LoRA-Pro: steps of lora_A and lora_B whose product is as close as possible to a full step.

        g̃ = s B g^A + s g^B A,  the nearest to G = dL/d(W + sBA) in the Frobenius norm
        g^A = (1/s²) (BᵀB)⁺ g_A + X A
        g^B = (1/s²) (I - B(BᵀB)⁺Bᵀ) g_B (AAᵀ)⁺ - B X        for any X [R, R]

    g_A = s BᵀG [R, K] and g_B = s G Aᵀ [N, R] are the gradients that backward computes; G [N, K] is
    never formed. ⁺ is the pseudo-inverse: eigenvalues of BᵀB and AAᵀ up to R·ε times the largest
    count as 0, at every step anew. At B = 0, where LoRA starts, the equations are therefore the
    paper's first step, g^A = 0 and g^B = (1/s²) g_B (AAᵀ)⁻¹. With the projections P_B on the
    columns of B and P_A on the rows of A, ‖g̃ - G‖ = ‖(I - P_B) G (I - P_A)‖.

    The factors move by -lr·g^A and -lr·g^B. Everything else that trains (magnitudes, biases, heads)
    moves by plain AdamW or SGD. The parameters are in two groups, by "name": "factors" and "other";
    every setting may differ per group. A parameter without a gradient does not move. s may be a
    tensor. Under DoRA, G is the gradient of W + sBA before the gain.

    The state of variant="adamw" is two moments of N·K elements per layer in fp32 (fp64 for fp64
    factors), as in full fine-tuning (`moment_bytes`), and one g̃ at a time lives beside it;
    variant="sgd" has no state. A step takes O((N + K)R² + R³) operations per layer, and with
    "adamw" four products of N·K·R more.

    Args:
        model: a model with adapters whose factors train.
        lr: the learning rate, a number or a tensor, at least 0.
        variant: "adamw" applies Adam's moments to g̃, as full fine-tuning would to G, and computes
            g^A and g^B from the result; "sgd" uses the g^A and g^B of G.
        betas: the coefficients (β₁, β₂) of the moments, each in [0, 1).
        eps: ε of Adam, at least 0.
        weight_decay: the decoupled weight decay, at least 0.
        x: the choice of X. Among all steps with the same g̃, "sylvester" is the nearest to
            (g_A, g_B). "zero" leaves to A what both factors could represent, "symmetric" divides it
            equally.
        decay: "factors": weight_decay multiplies A and B each by 1 - lr·weight_decay, as AdamW on
            LoRA does. "delta": their product. Which of the two the paper means could not be
            checked.
        foreach: torch's foreach form for the parameters outside the factors.
        fused: True for torch's fused kernel, where the device has one. It needs N·K elements more
            at a time.

    Raises:
        RuntimeError: the adapters are disabled.
        TypeError: model is no module.
        ValueError: a factor is frozen, a layer has a core or an out_scale (LaMDA, VeRA, AdaLoRA,
            AFLoRA), nothing trains, or an argument is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        lorafast.adapt(model, lorafast.LoRA(r=4))
        optimizer = lorafast.optim.LoRAPro(model, lr=1e-3)
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    Source:
        arXiv:2407.18242
    """

    paper: ClassVar[str] = "arXiv 2407.18242"
    trains: ClassVar[str] = "A, B, and what else trains"
    keeps: ClassVar[str] = "2 N·K per layer (sgd: nothing)"

    def __init__(
        self,
        model: nn.Module,
        lr: float | torch.Tensor,
        variant: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        x: str = "sylvester",
        decay: str = "factors",
        foreach: bool | None = None,
        fused: bool = False,
    ) -> None:
        # Before torch's constructor, which calls add_param_group.
        self._adapter_parameters = find_adapter_parameters(model)
        defaults = {
            "lr": lr,
            "variant": variant,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "x": x,
            "decay": decay,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(parameter_groups(model, self._adapter_parameters), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch. Both factors of a layer belong to the same group.

        Args:
            param_group: a parameter group.

        Raises:
            ValueError: a setting is out of range, a factor is frozen, the other factor of its layer
                is not in the group, or the layer has a core or an out_scale. The group is not added
                then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            members = set(group["params"])
            for parameter in group["params"]:
                if parameter in self._adapter_parameters:
                    _check_parameter(self._adapter_parameters[parameter], members)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: a function that evaluates the model and returns the loss.

        Returns:
            The result of the closure, None without one.

        Raises:
            RuntimeError: one factor of a layer has a gradient and the other has none, or a gradient
                is sparse. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(group, *self._ready(group)) for group in self.param_groups]
        for group, origins, others in ready:
            layers = [origin.layer for origin in origins]
            for layer, pair in zip(layers, _factor_pairs(layers), strict=True):
                self._step_pair(group, layer, pair)
            update = _adamw if group["variant"] == "adamw" else _sgd
            update(self.state, group, others)
        return loss

    def moment_bytes(self) -> int:
        """Return the size of the full-size moments, once every pair of factors has moved.

        Returns:
            Bytes: 2·N·K elements of fp32 (fp64 for fp64 factors) per layer of the groups with
            variant="adamw".
        """
        total = 0
        for group in self.param_groups:
            for origin in self._factor_origins(group) if group["variant"] == "adamw" else ():
                A, B = origin.layer.lora_A, origin.layer.lora_B
                total += 2 * B.shape[0] * A.shape[1] * accumulator(B.dtype).itemsize
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, as in torch, bit for bit.

        Args:
            state_dict: a result of `state_dict`.
        """
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype; moments of half-precision factors are fp32.
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            is_half = parameter.dtype != accumulator(parameter.dtype)
            if is_half and self._is_factor(parameter) and index in state_dict["state"]:
                self.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in state_dict["state"][index].items()
                }

    def _factor_origins(self, group: dict[str, Any]) -> list[AdapterParameter]:
        """Return one entry per pair of factors of the group: that of its lora_B."""
        origins = [self._adapter_parameters.get(parameter) for parameter in group["params"]]
        return [
            origin for origin in origins if origin is not None and origin.tensor_name == "lora_B"
        ]

    def _is_factor(self, parameter: nn.Parameter) -> bool:
        origin = self._adapter_parameters.get(parameter)
        return origin is not None and origin.tensor_name in FACTORS

    def _ready(self, group: dict[str, Any]) -> tuple[list[AdapterParameter], list[nn.Parameter]]:
        """Return the pairs and the other parameters of the group that have gradients."""
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(
                    f"a gradient {tuple(parameter.shape)} is sparse, which LoRA-Pro cannot use"
                )
        origins = [origin for origin in self._factor_origins(group) if _has_gradients(origin)]
        others = [p for p in group["params"] if p.grad is not None and not self._is_factor(p)]
        return origins, others

    def _step_pair(self, group: dict[str, Any], layer: AdapterLayer, pair: FactorPair) -> None:
        A, B = layer.lora_A, layer.lora_B
        assert A.grad is not None
        assert B.grad is not None
        g_A, g_B = A.grad.to(pair.A.dtype), B.grad.to(pair.B.dtype)
        if group["variant"] == "adamw":
            g = self._adam(group, B, equivalent_gradient(pair, g_A, g_B))
            g_A, g_B = factor_gradients(pair, g)
        step_A, step_B = solve_steps(pair, g_A, g_B, group["x"])
        shrink = 1 - group["lr"] * group["weight_decay"]
        for parameter, step in ((A, step_A), (B, step_B)):
            if group["weight_decay"]:
                parameter.mul_(shrink if group["decay"] == "factors" else max(shrink, 0) ** 0.5)
            parameter.sub_(step.mul_(group["lr"]))

    def _adam(self, group: dict[str, Any], B: nn.Parameter, g: torch.Tensor) -> torch.Tensor:
        """Return Adam's ĝ [N, K] after the gradient g. The memory of g is overwritten."""
        state = _initialized(self.state[B], g, group)
        if group["fused"]:
            # AdamW adds lr·ĝ to a parameter when it maximizes: from 0, with lr = 1, it gives ĝ.
            result = torch.zeros_like(g)
            settings = group | {"lr": 1.0, "weight_decay": 0.0}
            _functional_adamw([result], [g], [state], settings, maximize=True)
            return result
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        torch.div(v, 1 - beta2**step, out=g).sqrt_().add_(group["eps"])
        return torch.div(m, g, out=g).div_(1 - beta1**step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adapter_parameters": self._adapter_parameters}


def _factor_pairs(layers: list[AdapterLayer]) -> list[FactorPair]:
    return decompose_pairs(
        [(layer.lora_A, layer.lora_B, _as_scalar(layer.scaling)) for layer in layers]
    )


def _as_scalar(scaling: Scaling) -> Scaling:
    return scaling.detach().reshape(()) if isinstance(scaling, torch.Tensor) else scaling


def _initialized(
    state: dict[str, torch.Tensor], like: torch.Tensor, group: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the state, with moments of zeros like `like` if it is empty."""
    if not state:
        # As in torch, the step count is on the device for the fused kernel alone.
        device = like.device if group["fused"] else "cpu"
        state["step"] = torch.zeros((), device=device, dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(like)
        state["exp_avg_sq"] = torch.zeros_like(like)
    return state


def _adamw(state: dict[Any, Any], group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    if parameters:
        grads = [parameter.grad for parameter in parameters]
        states = [_initialized(state[p], p, group) for p in parameters]
        _functional_adamw(parameters, grads, states, group)


def _functional_adamw(
    parameters: list[Any],
    grads: list[Any],
    states: list[dict[str, torch.Tensor]],
    group: dict[str, Any],
    maximize: bool = False,
) -> None:
    adamw(
        parameters,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=maximize,
    )


def _sgd(state: dict[Any, Any], group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(parameter.grad * group["lr"])


def _check_settings(group: dict[str, Any]) -> None:
    for name, words in (("variant", VARIANTS), ("x", X_CHOICES), ("decay", DECAYS)):
        checks.word(name, group[name], words)
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]!r} must not be negative")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} must be two numbers in [0, 1)")


def _check_parameter(origin: AdapterParameter, members: set[nn.Parameter]) -> None:
    """Raise ValueError if the group of a parameter of an adapter cannot train it."""
    check_two_factors(origin, "LoRA-Pro")
    if max(getattr(origin.layer, name).dim() for name in FACTORS) > 2:
        raise ValueError(
            f"{origin.layer_name or 'the layer'} holds the factors of experts, and LoRA-Pro is for "
            "those of single layers: take another optimizer"
        )
    if origin.tensor_name not in FACTORS:
        return
    for name in FACTORS:
        factor = getattr(origin.layer, name)
        shown = f"{origin._replace(tensor_name=name)} {tuple(factor.shape)}"
        if not factor.requires_grad:
            raise ValueError(
                f"{shown} is frozen: LoRA-Pro moves both factors (for a frozen A there is LoRAFA)"
            )
        if factor not in members:
            raise ValueError(
                f"{shown} is not in the group of {origin}: "
                "LoRA-Pro moves a pair of factors together"
            )


def _has_gradients(origin: AdapterParameter) -> bool:
    """True if both factors of the layer have gradients. RuntimeError if one of them has."""
    A, B = origin.layer.lora_A, origin.layer.lora_B
    if (A.grad is None) != (B.grad is None):
        missing, present = ("lora_A", "lora_B") if A.grad is None else ("lora_B", "lora_A")
        raise RuntimeError(
            f"{origin.layer_name or 'the layer'} (A {tuple(A.shape)}, B {tuple(B.shape)}): "
            f"{present} has a gradient and {missing} none; LoRA-Pro needs both"
        )
    return A.grad is not None

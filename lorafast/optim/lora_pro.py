"""LoRA-Pro (arXiv 2407.18242): steps of A and B whose product is as near to a full step of the weight as two factors can make it.

    g̃ = s·B·g^A + s·g^B·A,  the nearest to G = dL/d(W + sBA) [N,K] in ‖·‖_F;  A [R,K], B [N,R]
    g^A = (1/s²)(BᵀB)⁺ g_A + X·A,  g^B = (1/s²)(I - B(BᵀB)⁺Bᵀ) g_B (AAᵀ)⁺ - B·X;  any X [R,R] gives the same g̃
    ‖g̃ - G‖ = ‖(I - P_B) G (I - P_A)‖, with the projections on B's columns and A's rows
g_A = s·Bᵀ·G and g_B = s·G·Aᵀ are what backward gives, so G itself is never needed. Where a factor lacks rank (B = 0 as LoRA starts,
A = 0 as an embedding's does), ⁺ is the pseudo-inverse and all three lines hold: at B = 0 they are the paper's first step, g^A = g_A
(= 0) and g^B = (1/s²) g_B (AAᵀ)⁻¹. That is decided at every step from the eigenvalues of BᵀB and AAᵀ, of which those up to R·ε
times the largest count as 0, and not from a count of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.optim.adamw import adamw

from lorafast.engine import checks
from lorafast.engine.problem import Scaling, accumulator
from lorafast.optim.factors import FACTORS, Held, groups, held, inverse_square, refuse_middle

VARIANTS = ("adamw", "sgd")
XS = ("sylvester", "zero", "symmetric")
DECAYS = ("factors", "delta")


class LoRAPro(torch.optim.Optimizer):
    """The factors step by -lr·g^A and -lr·g^B; what else trains (magnitudes, biases, heads) by plain AdamW or SGD.

    variant: "adamw" runs Adam's moments on g̃ itself, as full fine-tuning would on G, and takes g^A and g^B of the ĝ they give;
    "sgd" takes those of G. x: of all steps with this g̃ the "sylvester" one is nearest to (g_A, g_B); "zero" leaves to A what both
    factors could do, and "symmetric" halves it between them. decay: what weight_decay shrinks by 1 - lr·weight_decay, A and B each
    ("factors", as AdamW on LoRA) or their product ("delta"); which of the two the paper means could not be checked.
    fused: Adam in torch's fused kernel, where the device has one, and for that one more N·K at a time. foreach: for the plain part.
    Two groups, by "name": "factors" and "other"; every setting may be changed per group. add_param_group takes more; a pair of
    factors stands in one group. Under DoRA G is the gradient of W + sBA before the gain. s may be a tensor.
    Memory: "adamw" keeps two moments of N·K per layer in fp32 (fp64 for fp64 factors), as full fine-tuning does (moment_bytes()),
    and makes one g̃ at a time; "sgd" keeps nothing. Time per layer: O((N+K)R² + R³), and for "adamw" four products of N·K·R.
    ValueError for a frozen factor, a core or out_scale beside the factors (LaMDA, VeRA) and settings out of range. RuntimeError,
    and no step, where one factor of a pair has a gradient and the other none, or a gradient is sparse. What has no gradient rests.
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
        # Before torch's, which calls add_param_group.
        self._held = held(model)
        settings = {
            "lr": lr,
            "variant": variant,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "x": x,
            "decay": decay,
        }
        super().__init__(groups(model, self._held), settings | {"foreach": foreach, "fused": fused})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError, and no group, for what LoRA-Pro is not for, and for half a pair."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
            inside = set(self.param_groups[-1]["params"])
            for one in (self._held[p] for p in self.param_groups[-1]["params"] if p in self._held):
                _check_pair(one, inside)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after backward. Returns what closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(group, *self._ready(group)) for group in self.param_groups]
        for group, layers, others in ready:
            for pair, one in zip(_pairs(layers), layers, strict=True):
                self._step_pair(group, pair, one)
            _STEPS[group["variant"]](self.state, group, others)
        return loss

    def moment_bytes(self) -> int:
        """Bytes of the full-size moments once every pair has stepped: 2·N·K per layer of a group with variant="adamw"."""
        layers = [
            one.layer
            for group in self.param_groups
            if group["variant"] == "adamw"
            for one in self._factors(group)
        ]
        return sum(
            2 * ly.lora_B.shape[0] * ly.lora_A.shape[1] * accumulator(ly.lora_B.dtype).itemsize
            for ly in layers
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, to the bit: moments stay wide where the factors are in half precision."""
        super().load_state_dict(state_dict)
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(ours, theirs, strict=True):
            if (
                parameter.dtype != accumulator(parameter.dtype)
                and self._is_factor(parameter)
                and index in state_dict["state"]
            ):
                kept = state_dict["state"][index]
                self.state[parameter] = {
                    key: v.clone() if key == "step" else v.to(parameter.device, copy=True)
                    for key, v in kept.items()
                }

    def _factors(self, group: dict[str, Any]) -> list[Held]:
        """One entry per pair of the group."""
        return [
            self._held[p]
            for p in group["params"]
            if p in self._held and self._held[p].part == "lora_B"
        ]

    def _is_factor(self, parameter: nn.Parameter) -> bool:
        return parameter in self._held and self._held[parameter].part in FACTORS

    def _ready(self, group: dict[str, Any]) -> tuple[list[Held], list[nn.Parameter]]:
        """The pairs and the other parameters of the group that have gradients."""
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(
                    f"a gradient {tuple(parameter.shape)} is sparse, which LoRA-Pro cannot use"
                )
        pairs = []
        for one in self._factors(group):
            A, B = one.layer.lora_A, one.layer.lora_B
            if (A.grad is None) != (B.grad is None):
                lacks, has = ("lora_A", "lora_B") if A.grad is None else ("lora_B", "lora_A")
                shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
                raise RuntimeError(
                    f"{one.name or 'the layer'} ({shapes}): {has} has a gradient and {lacks} none; LoRA-Pro needs both"
                )
            if A.grad is not None:
                pairs.append(one)
        return pairs, [p for p in group["params"] if p.grad is not None and not self._is_factor(p)]

    def _step_pair(self, group: dict[str, Any], pair: Pair, one: Held) -> None:
        A, B = one.layer.lora_A, one.layer.lora_B
        g_A, g_B = A.grad.to(pair.A.dtype), B.grad.to(pair.B.dtype)
        if group["variant"] == "adamw":
            g_A, g_B = gradients_of(pair, self._adam(group, B, equivalent(pair, g_A, g_B)))
        step_A, step_B = solve(pair, g_A, g_B, group["x"])
        shrink = 1 - group["lr"] * group["weight_decay"]
        for parameter, step in ((A, step_A), (B, step_B)):
            if group["weight_decay"]:
                parameter.mul_(shrink if group["decay"] == "factors" else max(shrink, 0) ** 0.5)
            parameter.sub_(step.mul_(group["lr"]))

    def _adam(self, group: dict[str, Any], B: nn.Parameter, g: torch.Tensor) -> torch.Tensor:
        """ĝ of the moments that have seen g [N,K], in g's memory."""
        state = _started(self.state[B], g, group)
        if group["fused"]:
            # A parameter that is 0, climbs, and does so at rate 1, becomes ĝ.
            found = torch.zeros_like(g)
            _adamw_of(
                [found], [g], [state], group | {"lr": 1.0, "weight_decay": 0.0}, maximize=True
            )
            return found
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"].item()
        m, v = (
            state["exp_avg"].lerp_(g, 1 - beta1),
            state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2),
        )
        torch.div(v, 1 - beta2**step, out=g).sqrt_().add_(group["eps"])
        return torch.div(m, g, out=g).div_(1 - beta1**step)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_held": self._held}


class Pair(NamedTuple):
    """A [R,K], B [N,R] and s, with BᵀB = U·diag(λ)·Uᵀ and AAᵀ = V·diag(μ)·Vᵀ; an eigenvalue that is 0 but for rounding is 0."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: Scaling
    values_B: torch.Tensor
    vectors_B: torch.Tensor
    values_A: torch.Tensor
    vectors_A: torch.Tensor


def decompose(factors: list[tuple[torch.Tensor, torch.Tensor, Scaling]]) -> list[Pair]:
    """A Pair for every (A, B, s), in fp32 (fp64 for fp64). Matrices of one size are decomposed in one call."""
    wide = [
        (A.detach().to(accumulator(A.dtype)), B.detach().to(accumulator(B.dtype)), s)
        for A, B, s in factors
    ]
    alike: dict[tuple, list[int]] = {}
    for i, (A, B, _) in enumerate(wide):
        alike.setdefault((A.shape[0], A.dtype, B.dtype, A.device), []).append(i)
    pairs: dict[int, Pair] = {}
    for indices in alike.values():
        grams = torch.stack(
            [wide[i][1].t() @ wide[i][1] for i in indices]
            + [wide[i][0] @ wide[i][0].t() for i in indices]
        )
        values, vectors = torch.linalg.eigh(grams)
        cut = values[:, -1:].clamp(min=0) * (torch.finfo(values.dtype).eps * grams.shape[-1])
        values = values.masked_fill(values <= cut, 0)
        for place, i in enumerate(indices):
            other = place + len(indices)
            pairs[i] = Pair(*wide[i], values[place], vectors[place], values[other], vectors[other])
    return [pairs[i] for i in range(len(wide))]


def solve(
    pair: Pair, g_A: torch.Tensor, g_B: torch.Tensor, x: str = "sylvester"
) -> tuple[torch.Tensor, torch.Tensor]:
    """g^A [R,K] and g^B [N,R] of the module's equations from g_A and g_B, with the X asked for (one of XS)."""
    A, B = pair.A, pair.B
    over_B, over_A = _pinv(pair.values_B, pair.vectors_B), _pinv(pair.values_A, pair.vectors_A)
    factor = inverse_square(pair.scaling)
    step_A = (over_B @ g_A).mul_(factor)
    step_B = (g_B @ over_A).mul_(factor)
    step_B = torch.addmm(step_B, B, over_B @ (B.t() @ step_B), alpha=-1)
    if x == "zero":
        return step_A, step_B
    shared = step_A @ A.t()  # (1/s²)(BᵀB)⁺ g_A Aᵀ, what both factors could do
    if x == "symmetric":
        X = (shared @ over_A).mul_(-0.5)
    else:
        # BᵀB X + X AAᵀ = -shared: a division in the two eigenbases, and 0 where neither matrix has anything.
        sums = pair.values_B[:, None] + pair.values_A
        inner = (pair.vectors_B.t() @ shared @ pair.vectors_A).div_(sums).masked_fill_(sums == 0, 0)
        X = -(pair.vectors_B @ inner @ pair.vectors_A.t())
    return step_A.addmm_(X, A), step_B.addmm_(B, X, alpha=-1)


def equivalent(pair: Pair, g_A: torch.Tensor, g_B: torch.Tensor) -> torch.Tensor:
    """g̃ = s·B·g^A + s·g^B·A [N,K], in one product of rank 2R."""
    step_A, step_B = solve(pair, g_A, g_B, "zero")
    return (torch.cat((pair.B, step_B), 1) * pair.scaling) @ torch.cat((step_A, pair.A))


def gradients_of(pair: Pair, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g_A = s·Bᵀ·g and g_B = s·g·Aᵀ of a gradient g [N,K]."""
    return (pair.B * pair.scaling).t() @ g, g @ (pair.A * pair.scaling).t()


def _pinv(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (vectors * (1 / values).masked_fill(values == 0, 0)) @ vectors.t()


def _pairs(layers: list[Held]) -> list[Pair]:
    return decompose(
        [(one.layer.lora_A, one.layer.lora_B, _plain(one.layer.scaling)) for one in layers]
    )


def _plain(scaling: Scaling) -> Scaling:
    return scaling.detach().reshape(()) if isinstance(scaling, torch.Tensor) else scaling


def _started(
    state: dict[str, torch.Tensor], like: torch.Tensor, group: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The state with moments in it. As torch's: the count is on the device for the fused kernel alone."""
    if not state:
        step = torch.zeros((), device=like.device if group["fused"] else "cpu", dtype=torch.float32)
        state |= {
            "step": step,
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
        }
    return state


def _adamw(state: dict, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    if parameters:
        _adamw_of(
            parameters,
            [p.grad for p in parameters],
            [_started(state[p], p, group) for p in parameters],
            group,
        )


def _adamw_of(
    parameters: list, grads: list, states: list[dict], group: dict[str, Any], maximize: bool = False
) -> None:
    first, second, steps = (
        [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
    )
    (beta1, beta2), settings = (
        group["betas"],
        {key: group[key] for key in ("foreach", "fused", "lr", "weight_decay", "eps")},
    )
    adamw(
        parameters,
        grads,
        first,
        second,
        [],
        steps,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        maximize=maximize,
        **settings,
    )


def _sgd(state: dict, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(p.grad * group["lr"])


_STEPS = {"adamw": _adamw, "sgd": _sgd}


def _check_settings(group: dict[str, Any]) -> None:
    for name, words in (("variant", VARIANTS), ("x", XS), ("decay", DECAYS)):
        checks.word(name, group[name], words)
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}={group[name]!r} must not be negative")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} must be two numbers in [0, 1)")


def _check_pair(one: Held, inside: set[nn.Parameter]) -> None:
    refuse_middle(one, "LoRA-Pro")
    if one.part not in FACTORS:
        return
    for part in FACTORS:
        factor = getattr(one.layer, part)
        where = f"{one.name}.{part}".lstrip(".")
        if not factor.requires_grad:
            raise ValueError(
                f"{where} {tuple(factor.shape)} is frozen: LoRA-Pro moves both factors (for a frozen A there is LoRAFA)"
            )
        if factor not in inside:
            raise ValueError(
                f"{where} {tuple(factor.shape)} is not in the group of {one}: LoRA-Pro moves a pair of factors together"
            )

"""GaLore (arXiv 2403.03507): every weight trains, and Adam's moments live in a low-rank projection of the gradient.

    N ≥ K:  P = V_rᵀ [r,K],  R = G Pᵀ [N,r],  W ← (1-ηλ) W - η·scale·D P          G [N,K] = U Σ Vᵀ every update_gap steps
    N < K:  P = U_r  [N,r],  R = Pᵀ G [r,K],  W ← (1-ηλ) W - η·scale·P D
    M ← β₁M + (1-β₁)R,  V ← β₂V + (1-β₂)R²,  D = √(1-β₂ᵗ)/(1-β₁ᵗ) · M/(√V + ε)
M and V stay as they are when P changes, as in the authors' code; its ε is beside √V before the bias correction. It decays a
weight after the step and this file before it, as torch does: ηλ of one step's update apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lorafast.engine import checks
from lorafast.methods import svd
from lorafast.models.adapt_spec import ALL_LINEAR, Names
from lorafast.models.module_names import unwrapped
from lorafast.optim import weights


class GaLore(Optimizer):
    """AdamW over all that requires grad, the weights of targeted linears by their projected gradients.

    target_modules, exclude_modules: linears as lorafast.adapt reads them; "all-linear" leaves out the output head. Embeddings, the
    head, biases, norms, and linears with min(N,K) < rank train as under torch.optim.AdamW. svd_niter: 0 for an exact SVD of G, as
    the authors', n for n subspace iterations, which large layers need far less time for; None is exact up to min(N,K) = 1024.
    Memory beside the weights, for an N×K one with m = min(N,K), n = max(N,K): P and the moments, (m + 2n)·r numbers of the weight's
    dtype where AdamW keeps 2·m·n; and the gradient, m·n. per_layer=True frees each gradient as soon as backward has made it: the
    weight is updated there and then, step() only counts, and results are the same to the bit. It is for one process, one backward
    a step, no clipping and no GradScaler: the gradients are gone before anybody could sum, clip or unscale them.
    Make it after model.to(). ValueError where nothing would be projected or a number is out of range, and in step() for a gradient
    that is not finite when its SVD is due, before anything has changed (per_layer=True: before that weight has).
    """

    paper: ClassVar[str] = "arXiv 2403.03507"
    trains: ClassVar[str] = "every weight"
    keeps: ClassVar[str] = "what full training keeps; states (m + 2n)·r instead of 2·m·n"

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        rank: int = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        target_modules: Names = ALL_LINEAR,
        *,
        exclude_modules: Names | None = None,
        svd_niter: int | None = 0,
        per_layer: bool = False,
    ) -> None:
        for name, value in (("rank", rank), ("update_gap", update_gap)):
            checks.whole(name, value)
        for name, value in (
            ("lr", lr),
            ("scale", scale),
            ("eps", eps),
            ("weight_decay", weight_decay),
        ):
            checks.number(name, value)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be two numbers in [0, 1)")
        for beta in betas:
            checks.number("betas", beta, 1.0)
        svd.iterations(svd_niter)
        asked = weights.chosen(model, target_modules, exclude_modules)
        projected = [
            one.weight
            for one in asked
            if one.weight.requires_grad and min(one.weight.shape) >= rank
        ]
        if not projected:
            told = ", ".join(f"{one.name} {tuple(one.weight.shape)}" for one in asked[:5])
            raise ValueError(
                f"rank={rank}: no targeted weight requires grad and has min(N, K) of at least that, of {told}"
            )
        if per_layer:
            weights.refuse_parallel(model)
        held = set(projected)
        rest = [p for p in unwrapped(model).parameters() if p.requires_grad and p not in held]
        self._per_layer = per_layer
        groups = [{"params": projected, "rank": rank}] + ([{"params": rest}] if rest else [])
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
        }
        super().__init__(
            groups, defaults | {"update_gap": update_gap, "scale": scale, "svd_niter": svd_niter}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group with a rank is of matrices with min(N,K) of at least that, one without trains as under AdamW."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        for parameter in group["params"]:
            if group["rank"] is not None and (
                parameter.dim() != 2 or min(parameter.shape) < group["rank"]
            ):
                del self.param_groups[index]
                raise ValueError(
                    f"rank={group['rank']}: params has a {tuple(parameter.shape)}, too small to be projected"
                )
        if self._per_layer:
            # By its place: loading a state makes new groups.
            for parameter in group["params"]:
                weights.on_gradient(self, parameter, GaLore._step_one, index)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step by the gradients there are. With per_layer=True backward has made it already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._per_layer:
            due = [
                (group, [p for p in group["params"] if p.grad is not None])
                for group in self.param_groups
            ]
            for group, parameters in due:
                self._prepare(group, parameters)
            for group, parameters in due:
                self._move(group, parameters)
        return loss

    def _step_one(self, parameter: nn.Parameter, index: int) -> None:
        group = self.param_groups[index]
        self._prepare(group, [parameter])
        self._move(group, [parameter])

    def _prepare(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """All that may be refused, and new projections where they are due."""
        due = {}
        for parameter in parameters:
            G, state = parameter.grad, self.state[parameter]
            if G.is_sparse:
                raise ValueError(
                    f"the gradient of a parameter {tuple(G.shape)} is sparse; GaLore and AdamW need dense ones"
                )
            step = int(state.get("step", 0))
            if group["rank"] is not None and step % group["update_gap"] == 0:
                if not G.isfinite().all():
                    raise ValueError(
                        f"the gradient of a weight {tuple(G.shape)} is not finite: it has no SVD to project by"
                    )
                due[parameter] = _projection(G, group["rank"], group["svd_niter"])
        for parameter, projection in due.items():
            self.state[parameter]["projection"] = projection

    def _move(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        seen = [self._projected(parameter, group["rank"]) for parameter in parameters]
        for parameter, R in zip(parameters, seen, strict=True):
            state = self.state[parameter]
            if "exp_avg" not in state:
                # As torch's: a tensor, since its functional form counts in it.
                state |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(R),
                    "exp_avg_sq": torch.zeros_like(R),
                }
        if group["rank"] is None:
            states = [self.state[parameter] for parameter in parameters]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            adamw(
                parameters, seen, *moments, [], [state["step"] for state in states], amsgrad=False, beta1=beta1, beta2=beta2,
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            return
        for parameter, R in zip(parameters, seen, strict=True):
            state = self.state[parameter]
            M, V, P = state["exp_avg"], state["exp_avg_sq"], state["projection"]
            state["step"] += 1
            t = int(state["step"])
            M.lerp_(R, 1 - beta1)
            V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
            D = M / V.sqrt().add_(group["eps"])
            rate = group["lr"] * group["scale"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addmm_(*((D, P) if _tall(parameter) else (P, D)), alpha=-rate)

    def _projected(self, parameter: nn.Parameter, rank: int | None) -> torch.Tensor:
        if rank is None:
            return parameter.grad
        P = self.state[parameter]["projection"]
        return parameter.grad @ P.t() if _tall(parameter) else P.t() @ parameter.grad


def _tall(weight: torch.Tensor) -> bool:
    """Whether the columns are projected, of which there are no more than rows."""
    return weight.shape[0] >= weight.shape[1]


def _projection(G: torch.Tensor, rank: int, niter: int | None) -> torch.Tensor:
    """P [r,K] for a tall gradient, [N,r] for a wide one, in its dtype."""
    U, _, Vh = svd.top(G, rank, niter)
    return (Vh if _tall(G) else U).to(G.dtype).contiguous()

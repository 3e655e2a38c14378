"""GaLore, gradient low-rank projection (arXiv:2403.03507)."""

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
from lorafast.models.adapt_spec import ALL_LINEAR, ModuleSelector
from lorafast.models.module_names import unwrap
from lorafast.optim import weights
from lorafast.optim.weights import TargetWeight


class GaLore(Optimizer):
    """GaLore: AdamW for whole weights, with the moments in a low-rank projection of the gradient.

        N ≥ K:  P = V_rᵀ [r, K],  R = G Pᵀ [N, r],  W ← (1 - ηλ) W - η·scale·D P
        N < K:  P = U_r [N, r],   R = Pᵀ G [r, K],  W ← (1 - ηλ) W - η·scale·P D
        M ← β₁M + (1 - β₁)R,   V ← β₂V + (1 - β₂)R²
        D = √(1 - β₂ᵗ) / (1 - β₁ᵗ) · M / (√V + ε)

    G [N, K] = U Σ Vᵀ is the gradient of a weight, η the learning rate, λ the weight decay. P is
    computed every update_gap steps; M and V do not change when P does, as in the authors' code,
    whose ε also stands beside √V before the bias correction. The authors' code decays a weight
    after the step, this one before it, as torch does.

    The weights of targeted linears are projected; all other parameters that require grad train as
    under torch.optim.AdamW: embeddings, the head, biases, norms, and linears with min(N, K) < rank.
    With m = min(N, K) and n = max(N, K), P and the moments are (m + 2n)·r elements of the weight's
    dtype, where AdamW keeps 2·m·n. Create the optimizer after model.to(device).

    Args:
        model: a model in which at least one targeted weight requires grad.
        lr: learning rate η, at least 0.
        rank: rank r of the projection, at least 1.
        update_gap: steps from one projection to the next, at least 1.
        scale: factor of the projected update, at least 0.
        betas: the coefficients (β₁, β₂) of the moments, each in [0, 1).
        eps: ε, at least 0.
        weight_decay: λ, at least 0.
        target_modules: the linears whose weights are projected, selected as by `lorafast.adapt`.
            "all-linear" leaves out the output head.
        exclude_modules: linears to leave out, selected in the same way.
        svd_niter: 0 for an exact SVD of G, as the authors have it; n > 0 for n subspace iterations,
            which large layers need far less time for; None for an exact SVD up to
            min(N, K) = 1024.
        per_layer: True to update each weight inside backward and to free its gradient at once;
            step() then only calls the closure. The results are equal bit for bit. For one process,
            one backward per step, without gradient clipping and without a GradScaler.

    Raises:
        TypeError: a target is no linear.
        ValueError: an argument is out of range, no weight would be projected, or the model is in
            DistributedDataParallel with per_layer=True.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 16))
        optimizer = lorafast.optim.GaLore(model, lr=1e-3, rank=8)
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    Source:
        arXiv:2403.03507
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
        target_modules: ModuleSelector = ALL_LINEAR,
        *,
        exclude_modules: ModuleSelector | None = None,
        svd_niter: int | None = 0,
        per_layer: bool = False,
    ) -> None:
        counts = {"rank": rank, "update_gap": update_gap}
        numbers = {"lr": lr, "scale": scale, "eps": eps, "weight_decay": weight_decay}
        _check_arguments(counts, numbers, betas, svd_niter)
        projected = _projected_weights(
            weights.select_weights(model, target_modules, exclude_modules), rank
        )
        if per_layer:
            weights.check_not_ddp(model)
        self._per_layer = per_layer
        groups: list[dict[str, Any]] = [{"params": projected, "rank": rank}]
        exclude = set(projected)
        others = [p for p in unwrap(model).parameters() if p.requires_grad and p not in exclude]
        if others:
            groups.append({"params": others})
        defaults = numbers | {
            "betas": tuple(betas),
            "rank": None,
            "update_gap": update_gap,
            "svd_niter": svd_niter,
        }
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.

        Args:
            param_group: a group with a "rank" holds matrices to project; one without a rank trains
                as under AdamW.

        Raises:
            ValueError: a parameter of a group with a rank is no matrix, or its min(N, K) is
                smaller.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        rank = group["rank"]
        for parameter in group["params"]:
            if rank is not None and (parameter.dim() != 2 or min(parameter.shape) < rank):
                self.param_groups.pop()
                raise ValueError(
                    f"rank={rank}: params has a {tuple(parameter.shape)}, too small to be projected"
                )
        if self._per_layer:
            self._register_hooks(len(self.param_groups) - 1)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient.

        With per_layer=True backward has already updated them.

        Args:
            closure: a function that evaluates the model and returns the loss.

        Returns:
            The loss of the closure, None without one.

        Raises:
            ValueError: a gradient is sparse, or is not finite when its projection is due. Nothing
                has changed then; with per_layer=True, nothing of that weight.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._per_layer:
            ready = [
                (group, [p for p in group["params"] if p.grad is not None])
                for group in self.param_groups
            ]
            for group, parameters in ready:
                self._update_projections(group, parameters)
            for group, parameters in ready:
                self._update_parameters(group, parameters)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_per_layer": self._per_layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy's Parameters have no hooks. load_state_dict comes here too, without that key.
        if state.get("_per_layer"):
            for index in range(len(self.param_groups)):
                self._register_hooks(index)

    def _register_hooks(self, index: int) -> None:
        """Update the parameters of a group in backward.

        By the index of the group, because load_state_dict replaces the dict.
        """
        for parameter in self.param_groups[index]["params"]:
            weights.register_gradient_hook(self, parameter, GaLore._step_parameter, index)

    def _step_parameter(self, parameter: nn.Parameter, index: int) -> None:
        group = self.param_groups[index]
        self._update_projections(group, [parameter])
        self._update_parameters(group, [parameter])

    def _update_projections(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Check all gradients, then compute the projections that are due."""
        projections = {}
        for parameter in parameters:
            G, state = _gradient(parameter), self.state[parameter]
            if G.is_sparse:
                raise ValueError(
                    f"the gradient of a parameter {tuple(G.shape)} is sparse; "
                    "GaLore and AdamW need dense ones"
                )
            step = int(state.get("step", 0))
            if group["rank"] is not None and step % group["update_gap"] == 0:
                if not G.isfinite().all():
                    raise ValueError(
                        f"the gradient of a weight {tuple(G.shape)} is not finite: "
                        "it has no SVD to project by"
                    )
                projections[parameter] = _projection(G, group["rank"], group["svd_niter"])
        for parameter, projection in projections.items():
            self.state[parameter]["projection"] = projection

    def _update_parameters(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        gradients = [self._projected_gradient(p, group["rank"]) for p in parameters]
        for parameter, R in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if "exp_avg" not in state:
                # A tensor, because torch's functional AdamW increments it in place.
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(R)
                state["exp_avg_sq"] = torch.zeros_like(R)
        if group["rank"] is None:
            self._adamw(group, parameters, gradients)
            return
        for parameter, R in zip(parameters, gradients, strict=True):
            self._update_weight(group, parameter, R)

    def _adamw(
        self, group: dict[str, Any], parameters: list[nn.Parameter], gradients: list[torch.Tensor]
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _update_weight(
        self, group: dict[str, Any], parameter: nn.Parameter, R: torch.Tensor
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        M, V, P = state["exp_avg"], state["exp_avg_sq"], state["projection"]
        state["step"] += 1
        t = int(state["step"])
        M.lerp_(R, 1 - beta1)
        V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        D = M / V.sqrt().add_(group["eps"])
        rate = group["lr"] * group["scale"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        left, right = (D, P) if _is_tall(parameter) else (P, D)
        parameter.addmm_(left, right, alpha=-rate)

    def _projected_gradient(self, parameter: nn.Parameter, rank: int | None) -> torch.Tensor:
        gradient = _gradient(parameter)
        if rank is None:
            return gradient
        P = self.state[parameter]["projection"]
        return gradient @ P.t() if _is_tall(parameter) else P.t() @ gradient


def _check_arguments(
    counts: dict[str, int], numbers: dict[str, float], betas: Any, svd_niter: int | None
) -> None:
    for name, count in counts.items():
        checks.whole(name, count)
    for name, number in numbers.items():
        checks.number(name, number)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1)")
    for beta in betas:
        checks.number("betas", beta, 1.0)
    svd.check_niter(svd_niter)


def _projected_weights(targets: list[TargetWeight], rank: int) -> list[nn.Parameter]:
    """Return the weights that require grad and are large enough. ValueError if there is none."""
    projected = [
        target.weight
        for target in targets
        if target.weight.requires_grad and min(target.weight.shape) >= rank
    ]
    if not projected:
        examples = [f"{target.name} {tuple(target.weight.shape)}" for target in targets[:5]]
        raise ValueError(
            f"rank={rank}: no targeted weight requires grad and has min(N, K) of at least that, "
            f"of {', '.join(examples)}"
        )
    return projected


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient


def _is_tall(weight: torch.Tensor) -> bool:
    """True if the weight has at least as many rows as columns: then its columns are projected."""
    return weight.shape[0] >= weight.shape[1]


def _projection(G: torch.Tensor, rank: int, niter: int | None) -> torch.Tensor:
    """Return P, [r, K] for a tall gradient and [N, r] for a wide one, in the gradient's dtype."""
    U, _, Vh = svd.truncated_svd(G, rank, niter)
    return (Vh if _is_tall(G) else U).to(G.dtype).contiguous()

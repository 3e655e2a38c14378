"""AdaLoRA's budget allocation (arXiv:2303.10512)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.precision import accumulator
from lorafast.methods import adalora
from lorafast.methods.adapter import is_finite_number
from lorafast.models.adalora_format import SCHEDULE_ATTRIBUTE
from lorafast.models.module_names import adapter_layers, format_names, unwrap
from lorafast.nn.linear import AdapterLinearBase
from lorafast.runtime.torch_internals import foreach
from lorafast.schedule.adalora_triplets import (
    TRIPLET_TENSORS,
    Averages,
    all_averages,
    clone_averages,
    core_of,
    load_layer,
    select_triplets,
)

_SETTINGS = ("total_steps", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class AdaLoRA:
    """The schedule of AdaLoRA: a budget of triplets for all layers, which shrinks during training.

        I = |w ∘ ∂w|,   Ī ← β₁Ī + (1 - β₁)I,   Ū ← β₂Ū + (1 - β₂)|I - Ī|,   s(w) = Ī ∘ Ū
        S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)        the score of triplet i of a layer
        b(t) = ⌊b_T + (b₀ - b_T)(1 - (t - tinit)/(T - tinit - tfinal))³⌋

    for every element w of A [R, K], E [R] (the core) and B [N, R]. The budget b(t) is b₀, all
    triplets, up to tinit, and b_T, target_r per layer, from T - tfinal on; t is the number of
    optimizer steps done. Every deltaT steps E becomes 0 in the b₀ - b(t) triplets of the lowest
    scores, and in any triplet with the score of the last of them. Until T - tfinal such a triplet
    still has a gradient and may return; the choice made then is final, and applied at every step.

    Call `step()` after optimizer.step() and before zero_grad(), because it reads the gradients: it
    is PEFT's update_and_allocate(t) for t = 1, 2, …. Add `penalty()` to the loss. A step with a
    gradient that is not finite, which a GradScaler skips, does not enter the averages; a gradient
    that is None counts as 0. No tensor becomes smaller before `resize()`. The schedule holds two
    averages per element of A, E and B until the ranks are final.

    The formulas are those of the authors' code and of PEFT. Equation 12 of the paper has another
    numerator, with which b(t) would not reach b_T.

    Args:
        model: a model with `lorafast.AdaLoRA` adapters in linear layers.
        total_steps: T, the number of optimizer steps of the run.
        tinit: steps at the start with all triplets, at least 0.
        tfinal: steps at the end with the final triplets, at least 0.
        deltaT: steps from one budget to the next, at least 1.
        beta1: β₁ of the sensitivity's average, in (0, 1).
        beta2: β₂ of the uncertainty's average, in (0, 1).
        orth_reg_weight: the factor of `penalty()`, at least 0.

    Raises:
        TypeError: model is no module.
        ValueError: the model has no AdaLoRA layer, the layers have fewer triplets than the targets,
            or an argument is out of range.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        lorafast.adapt(model, lorafast.AdaLoRA(r=6, target_r=4))
        optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-3)
        schedule = lorafast.schedule.AdaLoRA(model, total_steps=20, tinit=2, tfinal=5)
        for _ in range(20):
            (model(torch.randn(4, 64)).square().mean() + schedule.penalty()).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ranks = schedule.resize(optimizer)

    Source:
        arXiv:2303.10512
    """

    paper: ClassVar[str] = "arXiv 2303.10512"
    trains: ClassVar[str] = "A, core, B; a triplet out of budget has a core of 0"
    keeps: ClassVar[str] = "two averages of A, core and B each, until the ranks are fixed"

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
    ) -> None:
        self._model = unwrap(model)
        layers = _find_layers(self._model)
        self.names = list(layers)
        self.layers = [layer for layer, _ in layers.values()]
        self.init_budget = sum(layer.r for layer in self.layers)
        self.target_budget = sum(adapter.target_r for _, adapter in layers.values())
        if self.target_budget > self.init_budget:
            raise ValueError(
                f"target_r of {len(self.layers)} layers makes {self.target_budget} triplets, "
                f"and they have {self.init_budget}"
            )
        self._configure(total_steps, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight)
        self.last_step = 0
        # Per layer; empty before the first step and once the ranks are final.
        self._sensitivity: list[Averages] = [{} for _ in self.layers]
        self._uncertainty: list[Averages] = [{} for _ in self.layers]
        # Per layer, a flag for every triplet that the last budget keeps; None before the first.
        self._kept: list[torch.Tensor] | None = None

    def budget(self, step: int) -> int:
        """Return b(t), the number of triplets of all layers together.

        Args:
            step: number of steps done, t.

        Returns:
            A number that falls from init_budget to target_budget.
        """
        if step <= self.tinit:
            return self.init_budget
        if step >= self._final_step:
            return self.target_budget
        remaining = 1 - (step - self.tinit) / (self._final_step - self.tinit)
        return int((self.init_budget - self.target_budget) * remaining**3 + self.target_budget)

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """A flag per triplet and layer, True for the triplets that the last budget keeps."""
        return {name: flags.tolist() for name, flags in zip(self.names, self._flags(), strict=True)}

    def parameters(self) -> list[nn.Parameter]:
        """Return the Parameters that the schedule scores: an optimizer must have all of them.

        Returns:
            lora_A, lora_core and lora_B of every layer that train.
        """
        tensors = [getattr(layer, name) for layer in self.layers for name in TRIPLET_TENSORS]
        return [tensor for tensor in tensors if tensor.requires_grad]

    def penalty(self, squared: bool = False) -> torch.Tensor:
        """Return the regularization term that keeps A and B close to orthogonal.

        Args:
            squared: False for orth_reg_weight times the mean of ‖AAᵀ - I‖ and ‖BᵀB - I‖ (Frobenius)
                over all layers, as in the authors' code and PEFT; True for orth_reg_weight times
                the sum of the squared norms, as in the paper's equation 4.

        Returns:
            A scalar tensor with a graph, in fp32 (fp64 for fp64 factors), under autocast too.
        """
        terms = [
            _orthogonality_error(matrix, squared)
            for layer in self.layers
            for matrix in (layer.lora_A, layer.lora_B.t())
        ]
        stacked = torch.stack([term.to(terms[0]) for term in terms])
        return self.orth_reg_weight * (stacked.sum() if squared else stacked.mean())

    @torch.no_grad()
    def step(self) -> None:
        """Update the averages with the gradients of this step, and apply the budget if it is due.

        Raises:
            NotImplementedError: a factor is sharded.
            RuntimeError: no adapter tensor has a gradient.
        """
        if hasattr(self.layers[0].lora_A, "full_tensor"):
            raise NotImplementedError(
                f"{self.names[0]}.lora_A is a sharded DTensor: "
                "AdaLoRA ranks the entries of whole ones"
            )
        t, final = self.last_step + 1, self._final_step
        if t < final:
            self._check_gradients()
            self._update_averages()
        if t == final or (self.tinit < t < final and t % self.deltaT == 0):
            self._kept = self._choose_triplets(self.init_budget - self.budget(t))
            self._mask()
        elif t > final:
            self._mask()
        if t == final:
            self._sensitivity = [{} for _ in self.layers]
            self._uncertainty = [{} for _ in self.layers]
        self.last_step = t

    @torch.no_grad()
    def resize(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Remove the triplets that are out of the budget from every layer.

        layer.r becomes the number of kept triplets; s does not change. Outputs are equal up to the
        rounding of sums without terms of 0. A layer without a kept triplet retains one, whose E
        every later `step()` sets to 0.

        The smaller Parameters are new objects. Any optimizer that is not passed, and DDP, must be
        created again, because they refer to the old ones. An earlier state dict of the model no
        longer loads; a file of `lorafast.save_adapter` records its ranks.

        Args:
            optimizer: an optimizer of the model. It gets the new Parameters in place of the old
                ones, with the state of the kept triplets.

        Returns:
            The new rank by layer name.

        Raises:
            RuntimeError: the ranks are not final yet, or a layer is merged.
        """
        if self.last_step < self._final_step:
            raise RuntimeError(
                f"the ranks are fixed after step {self._final_step}: "
                f"resize() after {self.last_step} is too early"
            )
        for layer in self.layers:
            layer._refuse_if_merged("resize()")
        kept = self._flags()
        for i, layer in enumerate(self.layers):
            indices = kept[i].nonzero().flatten()
            if not len(indices):
                indices = torch.zeros(1, dtype=torch.long, device=kept[i].device)
            kept[i] = kept[i][indices]
            if len(indices) < layer.r:
                select_triplets(layer, indices, optimizer)
        self._kept = kept
        self.init_budget = sum(layer.r for layer in self.layers)
        return {name: layer.r for name, layer in zip(self.names, self.layers, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule.

        Returns:
            "last_step", the settings, and "layers": by layer name the averages "sensitivity" and
            "uncertainty" and the flags "kept" of the last budget.
        """
        state: dict[str, Any] = {"last_step": self.last_step}
        state |= {name: getattr(self, name) for name in _SETTINGS}
        state["layers"] = {
            name: {
                "sensitivity": clone_averages(self._sensitivity[i]),
                "uncertainty": clone_averages(self._uncertainty[i]),
                "kept": None if self._kept is None else self._kept[i].clone(),
            }
            for i, name in enumerate(self.names)
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved schedule, before or after the model's state is loaded.

        Args:
            state: a result of `state_dict`.

        Raises:
            ValueError: the state is of another model or of other ranks, or lacks the averages or
                the flags of its step. Nothing has changed then.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(self.state_dict())}")
        if state["layers"].keys() != set(self.names):
            raise ValueError(
                f"state is of the layers {format_names(state['layers'])}, "
                f"the model has {format_names(self.names)}"
            )
        step = state["last_step"]
        checks.whole("last_step", step, 0)
        settings = {name: state[name] for name in _SETTINGS}
        final_step = _check_settings(**settings)
        loaded = [
            load_layer(name, layer, state["layers"][name], step, final_step)
            for name, layer in zip(self.names, self.layers, strict=True)
        ]
        self._configure(**settings)
        self.last_step = step
        self._sensitivity = [sensitivity for sensitivity, _, _ in loaded]
        self._uncertainty = [uncertainty for _, uncertainty, _ in loaded]
        kept = [flags for _, _, flags in loaded if flags is not None]
        self._kept = kept if len(kept) == len(loaded) else None

    def _configure(
        self,
        total_steps: int,
        tinit: int,
        tfinal: int,
        deltaT: int,
        beta1: float,
        beta2: float,
        orth_reg_weight: float,
    ) -> None:
        self._final_step = _check_settings(
            total_steps, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight
        )
        self.total_steps, self.tinit, self.tfinal, self.deltaT = total_steps, tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        # For adapter files: PEFT has these settings in an adapter's config.
        config = {name: getattr(self, name) for name in _SETTINGS if name != "total_steps"}
        self._model.__dict__[SCHEDULE_ATTRIBUTE] = {"total_step": total_steps} | config

    def _flags(self) -> list[torch.Tensor]:
        """Return the flags of every layer's triplets; all are True before the first budget."""
        if self._kept is not None:
            return list(self._kept)
        return [torch.ones(layer.r, dtype=torch.bool) for layer in self.layers]

    def _check_gradients(self) -> None:
        tensors = [getattr(layer, name) for layer in self.layers for name in TRIPLET_TENSORS]
        if all(tensor.grad is None for tensor in tensors):
            raise RuntimeError(
                f"{self.names[0]}.lora_A {tuple(self.layers[0].lora_A.shape)} has no gradient, "
                "nor has any other part: "
                "step() comes after backward() and optimizer.step(), before zero_grad()"
            )

    def _update_averages(self) -> None:
        """Update Ī and Ū with the gradients of this step: a dozen calls for all layers together."""
        tensors = [getattr(layer, name) for layer in self.layers for name in TRIPLET_TENSORS]
        values = [w.to(accumulator(w.dtype)) for w in tensors]
        grads = [
            torch.zeros_like(value) if w.grad is None else w.grad.to(value.dtype)
            for w, value in zip(tensors, values, strict=True)
        ]
        mean = all_averages(self._sensitivity, values)
        spread = all_averages(self._uncertainty, values)
        current = list(foreach("mul")(values, grads))
        foreach("abs_")(current)
        norms = foreach("norm")(current, 1)
        if not torch.stack([norm.to(norms[0]) for norm in norms]).isfinite().all():
            return
        foreach("mul_")(mean, self.beta1)
        foreach("add_")(mean, current, alpha=1 - self.beta1)
        foreach("sub_")(current, mean)
        foreach("abs_")(current)
        foreach("mul_")(spread, self.beta2)
        foreach("add_")(spread, current, alpha=1 - self.beta2)

    def _scores(self, i: int) -> torch.Tensor:
        """Return the scores S [R] of layer i."""
        sensitivity, uncertainty = self._sensitivity[i], self._uncertainty[i]
        A, E, B = (sensitivity[name] * uncertainty[name] for name in TRIPLET_TENSORS)
        return E + A.mean(1) + B.mean(0)

    def _choose_triplets(self, count: int) -> list[torch.Tensor]:
        """Return the flags of the triplets that stay when `count` of all must go."""
        scores = [self._scores(i) for i in range(len(self.layers))]
        # count is negative in a second run after a resize in which ties left fewer than b_T.
        if count <= 0:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        all_scores = torch.cat([score.to(scores[0].device) for score in scores])
        threshold = all_scores.kthvalue(count).values
        return [score > threshold.to(score.device) for score in scores]

    def _mask(self) -> None:
        for layer, flags in zip(self.layers, self._flags(), strict=True):
            core_of(layer).masked_fill_(~flags, 0.0)


def _find_layers(model: nn.Module) -> dict[str, tuple[AdapterLinearBase, adalora.AdaLoRA]]:
    """Return the AdaLoRA layers of the model with their adapters. ValueError if there is none."""
    layers: dict[str, tuple[AdapterLinearBase, adalora.AdaLoRA]] = {}
    for name, layer in adapter_layers(model, required=False).items():
        adapter = layer.adapter
        if isinstance(layer, AdapterLinearBase) and isinstance(adapter, adalora.AdaLoRA):
            layers[name] = (layer, adapter)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no layer with an AdaLoRA adapter")
    return layers


def _check_settings(
    total_steps: int,
    tinit: int,
    tfinal: int,
    deltaT: int,
    beta1: float,
    beta2: float,
    orth_reg_weight: float,
) -> int:
    """Return the step whose choice of triplets is final. ValueError for a bad setting."""
    checks.whole("total_steps", total_steps)
    checks.whole("tinit", tinit, 0)
    checks.whole("tfinal", tfinal, 0)
    checks.whole("deltaT", deltaT)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"{name}={beta!r} must be a number in (0, 1)")
    if not is_finite_number(orth_reg_weight) or orth_reg_weight < 0:
        raise ValueError(
            f"orth_reg_weight={orth_reg_weight!r} must be a finite number of at least 0"
        )
    # The final choice depends on the gradients of earlier steps: there must be one.
    if total_steps - tfinal <= max(tinit, 1):
        raise ValueError(
            f"tinit={tinit} and tfinal={tfinal} leave no step of total_steps={total_steps} "
            "to share a budget out in"
        )
    return total_steps - tfinal


def _orthogonality_error(matrix: torch.Tensor, squared: bool) -> torch.Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.to(accumulator(matrix.dtype))
        identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        error = matrix @ matrix.t() - identity
        return error.square().sum() if squared else torch.linalg.matrix_norm(error)

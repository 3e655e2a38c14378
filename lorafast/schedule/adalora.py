"""AdaLoRA's budget (arXiv 2303.10512): which triplets all layers together may keep, by how much the loss feels each of them.

    I = |w∘∂w|    Ī ← β₁Ī + (1-β₁)I    Ū ← β₂Ū + (1-β₂)|I - Ī|    s(w) = Ī∘Ū, for every entry w of A [R,K], E [R] and B [N,R]
    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)                 the score of triplet i of a layer
    b(t) = b₀ up to tinit, then ⌊b_T + (b₀ - b_T)(1 - (t - tinit)/(T - tinit - tfinal))³⌋, and b_T from T - tfinal on
b₀ is every triplet there is, b_T is target_r a layer, t the number of optimizer steps done. Where a budget is due, every deltaT
steps, E becomes 0 in the b₀ - b(t) triplets of the lowest scores (and in any whose score is that of the last of them). Until
T - tfinal such a triplet still has a gradient and may come back; the choice made then is kept, and E put back to 0 at every step.
The formulas are those of the authors' code and of PEFT; the paper's eq. 12 has another numerator, which leaves b(t) no way to b_T.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.problem import accumulator
from lorafast.methods import adalora
from lorafast.models.adalora_format import SCHEDULE
from lorafast.models.module_names import adapted, some, unwrapped
from lorafast.nn.linear import AdapterLinearBase

_PARTS = ("lora_A", "lora_core", "lora_B")
_SETTINGS = ("total_steps", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class AdaLoRA:
    """Shares one budget of triplets out over every AdaLoRA layer of the model, from all there are down to target_r a layer.

    step() comes after optimizer.step() and before zero_grad(), whose gradients it reads; like PEFT's update_and_allocate(t) at
    t = 1, 2, ..., total_steps. Add penalty() to the loss. tinit: steps with every triplet; tfinal: steps with those that are left
    at the end; deltaT: steps from one budget to the next; beta1, beta2: of the two averages; orth_reg_weight: of penalty().
    A step with a gradient that is not finite (a GradScaler skips it) is not felt; a gradient that is None counts as 0.
    Nothing gets smaller before resize(). Raises ValueError or TypeError naming the argument. state_dict as torch's: it holds the
    averages, two numbers for every one of A, E and B, until the ranks are fixed.
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
        self._model = unwrapped(model)
        found = {
            name: layer
            for name, layer in adapted(self._model, required=False).items()
            if isinstance(layer, AdapterLinearBase) and isinstance(layer.adapter, adalora.AdaLoRA)
        }
        if not found:
            raise ValueError(
                f"model {type(self._model).__name__} has no layer with an AdaLoRA adapter"
            )
        self.names, self.layers = list(found), list(found.values())
        self.init_budget = sum(layer.r for layer in self.layers)
        self.target_budget = sum(layer.adapter.target_r for layer in self.layers)
        if self.target_budget > self.init_budget:
            raise ValueError(
                f"target_r of {len(self.layers)} layers makes {self.target_budget} triplets, and they have {self.init_budget}"
            )
        self._set(total_steps, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight)
        self.last_step = 0
        # Of each layer, by part; empty before the first step and once the ranks are fixed.
        self._sensitivity: list[dict[str, torch.Tensor]] = [{} for _ in self.layers]
        self._uncertainty: list[dict[str, torch.Tensor]] = [{} for _ in self.layers]
        # Of each layer, which triplets the last budget left it.
        self._kept: list[torch.Tensor] | None = None

    def budget(self, step: int) -> int:
        """b(t): how many triplets all layers together may keep after step t."""
        if step <= self.tinit:
            return self.init_budget
        if step >= self._end:
            return self.target_budget
        left = 1 - (step - self.tinit) / (self._end - self.tinit)
        return int((self.init_budget - self.target_budget) * left**3 + self.target_budget)

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """By layer, which triplets the last budget left it; all of them before the first."""
        kept = self._kept or [torch.ones(layer.r, dtype=torch.bool) for layer in self.layers]
        return {name: one.tolist() for name, one in zip(self.names, kept, strict=True)}

    def penalty(self, squared: bool = False) -> torch.Tensor:
        """orth_reg_weight · the mean of ‖AAᵀ - I‖ and ‖BᵀB - I‖ (Frobenius) over all layers, as the authors' code and PEFT have it.

        squared=True: orth_reg_weight · the sum of the norms' squares, the paper's eq. 4. In fp32 (fp64 for fp64), autocast or not.
        """
        terms = [
            self._distance(M, squared)
            for layer in self.layers
            for M in (layer.lora_A, layer.lora_B.t())
        ]
        together = torch.stack([term.to(terms[0]) for term in terms])
        return self.orth_reg_weight * (together.sum() if squared else together.mean())

    @torch.no_grad()
    def step(self) -> None:
        """Take in the gradients of this step, and give triplets up if a budget is due."""
        if hasattr(self.layers[0].lora_A, "full_tensor"):
            raise NotImplementedError(
                f"{self.names[0]}.lora_A is a sharded DTensor: AdaLoRA ranks the entries of whole ones"
            )
        t = self.last_step + 1
        if t < self._end:
            self._refuse_without_gradients()
            self._feel()
        if t == self._end or (self.tinit < t < self._end and t % self.deltaT == 0):
            self._kept = self._chosen(self.init_budget - self.budget(t))
            self._mask()
        elif t > self._end:
            self._mask()
        if t == self._end:
            self._forget()
        self.last_step = t

    @torch.no_grad()
    def resize(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Drop what no budget left: layer.r becomes the number of triplets a layer keeps, and s stays. Returns r by layer.

        Outputs are the same to within the rounding of sums that have lost terms of 0. A layer that keeps none holds on to one, its
        E put back to 0 by every later step(). Once the ranks are fixed only: RuntimeError before, or if a layer is merged.
        The smaller Parameters are new ones. optimizer: is given them in the old ones' places, with as much of what it remembers;
        any other optimizer must be made anew, since it would go on with Parameters that no layer has, and so must DDP. An older
        state dict fits no more; a file of save_adapter says its own ranks.
        """
        if self.last_step < self._end:
            raise RuntimeError(
                f"the ranks are fixed after step {self._end}: resize() after {self.last_step} is too early"
            )
        for layer in self.layers:
            layer._refuse_if_merged("resize()")
        for i, (layer, kept) in enumerate(zip(self.layers, self._kept, strict=True)):
            left = (
                kept.nonzero().flatten()
                if kept.any()
                else torch.zeros(1, dtype=torch.long, device=kept.device)
            )
            self._kept[i] = kept[left]
            if len(left) < layer.r:
                _shrink(layer, left, optimizer)
        self.init_budget = sum(layer.r for layer in self.layers)
        return {name: layer.r for name, layer in zip(self.names, self.layers, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The step count, settings, and by layer the averages and what the last budget left."""
        state = {"last_step": self.last_step} | {name: getattr(self, name) for name in _SETTINGS}
        held = zip(
            self.names,
            self._sensitivity,
            self._uncertainty,
            self._kept or [None] * len(self.layers),
            strict=True,
        )
        state["layers"] = {
            name: {
                "sensitivity": {part: tensor.clone() for part, tensor in sensitivity.items()},
                "uncertainty": {part: tensor.clone() for part, tensor in uncertainty.items()},
                "kept": None if kept is None else kept.clone(),
            }
            for name, sensitivity, uncertainty, kept in held
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved schedule. The model's state may be loaded before or after.

        ValueError, and nothing changes, if it is of another model, of other ranks, or lacks the averages (or the choice, once that
        is made) of its step.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state {sorted(state)} must hold {sorted(self.state_dict())}")
        if state["layers"].keys() != set(self.names):
            raise ValueError(
                f"state is of the layers {some(state['layers'])}, the model has {some(self.names)}"
            )
        step = state["last_step"]
        checks.whole("last_step", step, 0)
        settings = {name: state[name] for name in _SETTINGS}
        end = _checked(**settings)
        loaded = [
            _loaded(name, layer, state["layers"][name], step, end)
            for name, layer in zip(self.names, self.layers, strict=True)
        ]
        self._set(**settings)
        self.last_step = step
        self._sensitivity, self._uncertainty, kept = (
            list(column) for column in zip(*loaded, strict=True)
        )
        self._kept = None if any(one is None for one in kept) else kept

    def _set(
        self,
        total_steps: int,
        tinit: int,
        tfinal: int,
        deltaT: int,
        beta1: float,
        beta2: float,
        orth_reg_weight: float,
    ) -> None:
        self._end = _checked(total_steps, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight)
        self.total_steps, self.tinit, self.tfinal, self.deltaT = total_steps, tinit, tfinal, deltaT
        self.beta1, self.beta2, self.orth_reg_weight = beta1, beta2, orth_reg_weight
        # For PEFT, which has these in an adapter's config.
        self._model.__dict__[SCHEDULE] = {"total_step": total_steps} | {
            name: getattr(self, name) for name in _SETTINGS[1:]
        }

    @staticmethod
    def _distance(M: torch.Tensor, squared: bool) -> torch.Tensor:
        with torch.autocast(M.device.type, enabled=False):
            M = M.to(accumulator(M.dtype))
            off = M @ M.t() - torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
            return off.square().sum() if squared else torch.linalg.matrix_norm(off)

    def _refuse_without_gradients(self) -> None:
        if all(getattr(layer, part).grad is None for layer in self.layers for part in _PARTS):
            raise RuntimeError(
                f"{self.names[0]}.lora_A {tuple(self.layers[0].lora_A.shape)} has no gradient, nor has any other part: "
                "step() comes after backward() and optimizer.step(), before zero_grad()"
            )

    def _feel(self) -> None:
        """Take this step's gradients into the averages: a dozen calls for all layers together."""
        parts = [getattr(layer, part) for layer in self.layers for part in _PARTS]
        wide = [w.to(accumulator(w.dtype)) for w in parts]
        for averages in (self._sensitivity, self._uncertainty):
            if not averages[0]:
                averages[:] = [
                    {
                        part: torch.zeros_like(w)
                        for part, w in zip(_PARTS, wide[i : i + len(_PARTS)], strict=True)
                    }
                    for i in range(0, len(wide), len(_PARTS))
                ]
        grads = [
            torch.zeros_like(w) if held.grad is None else held.grad.to(w.dtype)
            for held, w in zip(parts, wide, strict=True)
        ]
        now = torch._foreach_mul(wide, grads)
        torch._foreach_abs_(now)
        norms = torch._foreach_norm(now, 1)
        if not torch.stack([norm.to(norms[0]) for norm in norms]).isfinite().all():
            return
        mean, spread = (
            [one[part] for one in averages for part in _PARTS]
            for averages in (self._sensitivity, self._uncertainty)
        )
        torch._foreach_mul_(mean, self.beta1)
        torch._foreach_add_(mean, now, alpha=1 - self.beta1)
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_mul_(spread, self.beta2)
        torch._foreach_add_(spread, now, alpha=1 - self.beta2)

    def _scores(self, i: int) -> torch.Tensor:
        """S [R] of one layer."""
        A, E, B = (self._sensitivity[i][part] * self._uncertainty[i][part] for part in _PARTS)
        return E + A.mean(1) + B.mean(0)

    def _chosen(self, out: int) -> list[torch.Tensor]:
        """Of each layer, which triplets stay when `out` of all have to go."""
        scores = [self._scores(i) for i in range(len(self.layers))]
        # Less than none where a run begins again after a resize that ties have left below b_T.
        if out <= 0:
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        threshold = torch.cat([score.to(scores[0].device) for score in scores]).kthvalue(out).values
        return [score > threshold.to(score.device) for score in scores]

    def _mask(self) -> None:
        for layer, kept in zip(self.layers, self._kept, strict=True):
            layer.lora_core.masked_fill_(~kept, 0.0)

    def _forget(self) -> None:
        self._sensitivity, self._uncertainty = ([{} for _ in self.layers] for _ in range(2))


def _checked(
    total_steps: int,
    tinit: int,
    tfinal: int,
    deltaT: int,
    beta1: float,
    beta2: float,
    orth_reg_weight: float,
) -> int:
    """The step whose choice is kept, of settings that can be."""
    for name, value, least in (
        ("total_steps", total_steps, 1),
        ("tinit", tinit, 0),
        ("tfinal", tfinal, 0),
        ("deltaT", deltaT, 1),
    ):
        checks.whole(name, value, least)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must be a number in (0, 1)")
    weight = orth_reg_weight
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < math.inf
    ):
        raise ValueError(f"orth_reg_weight={weight!r} must be a finite number of at least 0")
    # The last choice rests on the gradients of the steps before it: there must be one.
    if total_steps - tfinal <= max(tinit, 1):
        raise ValueError(
            f"tinit={tinit} and tfinal={tfinal} leave no step of total_steps={total_steps} to share a budget out in"
        )
    return total_steps - tfinal


def _loaded(
    name: str, layer: AdapterLinearBase, held: dict[str, Any], step: int, end: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor | None]:
    """One layer's share of a state, copied to where its parts are. ValueError if it cannot be that of this step."""
    if step == 0:
        return {}, {}, None
    averages = []
    for what in ("sensitivity", "uncertainty"):
        given = held[what]
        if given.keys() != (set(_PARTS) if step < end else set()):
            raise ValueError(
                f"state: {name} has the {what} of {sorted(given) or 'nothing'} after step {step} of {end}"
            )
        for part, tensor in given.items():
            _refuse_shape(f"{name}: {what} of {part}", tensor, getattr(layer, part))
        averages.append(
            {part: _beside(getattr(layer, part), tensor) for part, tensor in given.items()}
        )
    kept = held["kept"]
    if kept is None and step >= end:
        raise ValueError(
            f"state: {name} has not what it keeps, which is fixed after step {end}, and this is step {step}"
        )
    if kept is not None:
        _refuse_shape(f"{name}: kept", kept, layer.lora_core)
        kept = kept.to(layer.lora_core.device, torch.bool, copy=True)
    return *averages, kept


def _refuse_shape(what: str, given: torch.Tensor, part: torch.Tensor) -> None:
    if given.shape != part.shape:
        raise ValueError(
            f"state: {what} {tuple(given.shape)} must be {tuple(part.shape)} for this model"
        )


def _beside(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(part.device, accumulator(part.dtype), copy=True)


def _shrink(
    layer: AdapterLinearBase, left: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Leave a layer the triplets of these indices, and an optimizer what it remembers of them."""
    for part in _PARTS:
        old, at = getattr(layer, part), 1 if part == "lora_B" else 0
        new = nn.Parameter(old.detach().index_select(at, left), requires_grad=old.requires_grad)
        setattr(layer, part, new)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [new if one is old else one for one in group["params"]]
            optimizer.state[new] = {
                name: held.index_select(at, left)
                if isinstance(held, torch.Tensor) and held.shape == old.shape
                else held
                for name, held in optimizer.state.pop(old, {}).items()
            }
    layer.adapter = replace(layer.adapter, r=len(left))
